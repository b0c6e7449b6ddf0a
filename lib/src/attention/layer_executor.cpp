// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/layer_executor.hpp>

#include <annulus/core/error.hpp>
#include <annulus/kernels/dtype.hpp>

#include "staged_rows.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace annulus {

namespace {

/// Rows that go through scratch at a time. A host's stay in its last cache; a device needs many to fill it.
constexpr std::int64_t kHostChunkRows = 1024;
constexpr std::int64_t kDeviceChunkRows = 16384;
constexpr std::int64_t kLeastChunkRows = 256;
constexpr std::int64_t kDeviceScratchBytes = std::int64_t{256} << 20;

constexpr auto kFloatBytes = static_cast<std::int64_t>(sizeof(float));

std::int64_t most_features(const Layer& layer, const Problem& problem) { return std::max(layer.embed, q_features(problem)); }

std::int64_t chunk_rows_of(const Layer& layer, const Problem& problem, std::int64_t rows, bool host_memory) {
  const std::int64_t most =
      host_memory ? kHostChunkRows
                  : std::clamp(kDeviceScratchBytes / (kFloatBytes * most_features(layer, problem)), kLeastChunkRows, kDeviceChunkRows);
  return std::min(most, std::max<std::int64_t>(1, rows));
}

bool is_matrix(const LayerSource& source, Weight which) { return source.extents(which).size() == 2; }

/// In memory of the device: matrices in the dtype, vectors in fp32.
std::int64_t weight_bytes(const LayerSource& source, Weight which, DType dtype) {
  return source.elements(which) * (is_matrix(source, which) ? size_of(dtype) : kFloatBytes);
}

/// What a layer projects, of those that its source has.
std::vector<Activation> activations_of(const LayerSource& source) {
  std::vector<Activation> all;
  for (const Activation which : {Activation::x, Activation::x_key, Activation::x_value}) {
    if (source.has(which)) { all.push_back(which); }
  }
  return all;
}

/// values [out, in] in fp32 -> [in, out] in the dtype.
std::vector<std::byte> turned(const std::vector<float>& values, std::int64_t out, std::int64_t in, DType dtype) {
  constexpr std::int64_t kBlock = 64;  // of both axes: either side's lines are used whole
  std::vector<std::byte> bytes(values.size() * static_cast<std::size_t>(size_of(dtype)));
  kernels::with_element(dtype, [&](auto tag) {
    using Element = decltype(tag);
    auto* to = reinterpret_cast<Element*>(bytes.data());
    for (std::int64_t row = 0; row < out; row += kBlock) {
      for (std::int64_t column = 0; column < in; column += kBlock) {
        for (std::int64_t i = row; i < std::min(out, row + kBlock); ++i) {
          for (std::int64_t j = column; j < std::min(in, column + kBlock); ++j) {
            to[j * out + i] = kernels::from_float<Element>(values[static_cast<std::size_t>(i * in + j)]);
          }
        }
      }
    }
  });
  return bytes;
}

}  // namespace

LayerCost layer_cost(const LayerSource& source, const Layer& layer, const Problem& problem, std::int64_t rows, bool host_memory) {
  LayerCost cost;
  Int128 activations = layer.embed;  // y
  for (const Activation which : activations_of(source)) { activations += features_of(layer, which); }
  const Int128 tokens = Int128{problem.batch} * rows;
  const Int128 bytes = activations * tokens * size_of(problem.dtype);
  ANNULUS_EXPECTS(bytes < (Int128{1} << 62), "the layer's rows of one rank are {} bytes, beyond 2^62", bytes);
  cost.activation_bytes = static_cast<std::int64_t>(bytes);
  for (const auto& [which, name] : EnumNames<Weight>::values) {
    cost.weight_bytes += weight_bytes(source, which, problem.dtype);
    if (is_matrix(source, which)) { cost.flops += 2.0 * static_cast<double>(source.elements(which)) * static_cast<double>(tokens); }
  }
  const std::int64_t chunk = chunk_rows_of(layer, problem, rows, host_memory);
  cost.scratch_bytes = chunk * (kFloatBytes * most_features(layer, problem) + size_of(problem.dtype) * q_features(problem));
  return cost;
}

std::int64_t weight_reading_bytes(const LayerSource& source, DType dtype) {
  std::int64_t most = 0;
  for (const auto& [which, name] : EnumNames<Weight>::values) { most = std::max(most, source.elements(which)); }
  // As stored, widened, and turned round.
  return most * (2 * kFloatBytes + size_of(dtype));
}

LayerResources::LayerResources(const LayerSource& source, const Layer& layer, const Problem& problem, std::int64_t rows, int threads,
                               Device& device, Queue& queue)
    : source_(source),
      layer_(layer),
      dtype_(problem.dtype),
      device_(device),
      queue_(queue),
      kernel_(make_layer_kernel(device, threads)),
      chunk_rows_(chunk_rows_of(layer, problem, rows, device.host_memory())),
      products_(device.allocate(chunk_rows_ * kFloatBytes * most_features(layer, problem), MemoryUse::tensor)),
      rows_(device.allocate(chunk_rows_ * size_of(dtype_) * q_features(problem), MemoryUse::tensor)) {
  for (const auto& [which, name] : EnumNames<Weight>::values) {
    if (source.has(which)) { weights_.emplace(which, device.allocate(weight_bytes(source, which, dtype_), MemoryUse::tensor)); }
  }
}

void LayerResources::load() {
  for (const auto& [which, buffer] : weights_) {
    const std::vector<std::int64_t> extents = source_.extents(which);
    const std::vector<float> values = source_.weights(which);
    std::vector<std::byte> matrix;
    if (is_matrix(source_, which)) { matrix = turned(values, extents[0], extents[1], dtype_); }
    device_.upload(queue_, buffer.get(), matrix.empty() ? static_cast<const void*>(values.data()) : matrix.data(), buffer.bytes());
    queue_.synchronize();
  }
}

const std::byte* LayerResources::matrix(Weight which) const {
  const auto found = weights_.find(which);
  return found == weights_.end() ? nullptr : found->second.get();
}

const float* LayerResources::vector(Weight which) const { return reinterpret_cast<const float*>(matrix(which)); }

std::int64_t LayerResources::length(Weight which) const { return source_.elements(which); }

LayerExecutor::LayerExecutor(const LayerResources& resources, RingExecutor& ring, Device& device, Queue& queue, Watchdog& watchdog)
    : resources_(resources), ring_(ring), device_(device), queue_(queue), watchdog_(watchdog) {
  const Problem& problem = ring.plan().problem;
  const auto bytes = [&](std::int64_t features) { return problem.batch * ring.plan().local_rows * features * size_of(problem.dtype); };
  for (const Activation which : activations_of(resources.source())) {
    activations_.emplace(which, device.allocate(bytes(features_of(resources.layer(), which)), MemoryUse::tensor));
  }
  output_ = device.allocate(bytes(resources.layer().embed), MemoryUse::tensor);
}

template <class Visit>
void LayerExecutor::for_each_chunk(std::int64_t most, const Visit& visit) {
  const RingPlan& plan = ring_.plan();
  Chunk chunk;
  for (chunk.batch = 0; chunk.batch < plan.problem.batch; ++chunk.batch) {
    for (const ShardPiece& piece : plan.shard.pieces) {
      ANNULUS_ASSERT(piece.global.stride == 1, "projecting rows {} apart", piece.global.stride);
      for (std::int64_t done = 0; done < piece.global.count; done += chunk.count) {
        chunk.global = piece.global.first + done;
        chunk.local = piece.local_first + done;
        chunk.count = std::min(most, piece.global.count - done);
        visit(chunk);
        watchdog_.progress();
      }
    }
  }
}

std::byte* LayerExecutor::activation_rows(Activation which, const Chunk& chunk) const {
  const RingPlan& plan = ring_.plan();
  const std::int64_t row_bytes = features_of(resources_.layer(), which) * size_of(plan.problem.dtype);
  return activations_.at(which).get() + (chunk.batch * plan.local_rows + chunk.local) * row_bytes;
}

std::byte* LayerExecutor::output_rows(const Chunk& chunk) const {
  const RingPlan& plan = ring_.plan();
  return output_.get() + (chunk.batch * plan.local_rows + chunk.local) * resources_.layer().embed * size_of(plan.problem.dtype);
}

void LayerExecutor::load(std::int64_t first_batch) {
  const DType dtype = ring_.plan().problem.dtype;
  for (const Activation which : activations_of(resources_.source())) {
    const std::int64_t row_bytes = features_of(resources_.layer(), which) * size_of(dtype);
    for_each_chunk(std::numeric_limits<std::int64_t>::max(), [&](const Chunk& piece) {
      read_staged(
          device_, queue_, watchdog_, activation_rows(which, piece), piece.count, row_bytes,
          [&](std::int64_t done, std::int64_t rows, std::byte* out) {
            resources_.source().read(which, first_batch + piece.batch, piece.global + done, rows, dtype, out);
          },
          [](std::int64_t /*done*/, std::int64_t most) { return most; });
    });
  }
  if (ring_.owns_extra_keys()) { place_appended_keys(); }
}

void LayerExecutor::place_appended_keys() {
  const Problem& problem = ring_.plan().problem;
  for (const auto& [tensor, weight] : {std::pair{Tensor::k_extra, Weight::bias_k}, {Tensor::v_extra, Weight::bias_v}}) {
    std::vector<float> values;
    if (resources_.layer().bias_kv) { values = resources_.source().weights(weight); }
    values.resize(static_cast<std::size_t>(problem.extra_keys * kv_features(problem)), 0.0F);
    std::vector<std::byte> rows(values.size() * static_cast<std::size_t>(size_of(problem.dtype)));
    kernels::with_element(problem.dtype, [&](auto tag) {
      using Element = decltype(tag);
      auto* to = reinterpret_cast<Element*>(rows.data());
      for (const float value : values) { *to++ = kernels::from_float<Element>(value); }
    });
    for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
      device_.upload(queue_, ring_.extra_place(tensor, batch), rows.data(), std::ssize(rows));
    }
    queue_.synchronize();
  }
}

void LayerExecutor::multiply(const Chunk& chunk, const Product& product, kernels::TransformTask after, std::byte* out) const {
  const DType dtype = ring_.plan().problem.dtype;
  kernels::LinearTask linear;
  linear.dtype = dtype;
  linear.rows = chunk.count;
  linear.in_features = product.in_features;
  linear.out_features = product.out_features;
  linear.in = product.in;
  linear.weight = resources_.matrix(product.weight);
  after.bias = resources_.vector(product.bias);
  if (after.bias == nullptr && after.norm == Norm::none && after.rotary == RotaryPairs::none) {
    linear.out_dtype = dtype;
    linear.out = out;
    resources_.kernel().linear(queue_, linear);
    return;
  }
  linear.out_dtype = DType::fp32;
  linear.out = resources_.products();
  resources_.kernel().linear(queue_, linear);
  after.rows = chunk.count;
  after.features = product.out_features;
  after.in_dtype = DType::fp32;
  after.in = resources_.products();
  after.out_dtype = dtype;
  after.out = out;
  resources_.kernel().transform(queue_, after);
}

void LayerExecutor::take_norm(Norm norm, Weight weight, Weight bias, std::int64_t features, kernels::TransformTask& task) const {
  task.norm = norm;
  task.norm_epsilon = resources_.layer().norm_epsilon;
  task.norm_weight = resources_.vector(weight);
  task.norm_bias = resources_.vector(bias);
  const std::int64_t length = std::max(resources_.length(weight), resources_.length(bias));
  task.norm_features = length > 0 ? length : features;
}

void LayerExecutor::project(Tensor tensor, const Chunk& chunk) {
  const Problem& problem = ring_.plan().problem;
  const Layer& layer = resources_.layer();
  struct Names {
    Activation in;
    Weight weight;
    Weight bias;
    Weight norm_weight;
    Weight norm_bias;
  };
  const auto names_of_tensor = [&]() -> Names {
    switch (tensor) {
      case Tensor::q:
        return {Activation::x, Weight::wq, Weight::bq, Weight::q_norm_weight, Weight::q_norm_bias};
      case Tensor::k:
        return {Activation::x_key, Weight::wk, Weight::bk, Weight::k_norm_weight, Weight::k_norm_bias};
      case Tensor::v:
      case Tensor::k_extra:
      case Tensor::v_extra:
      case Tensor::dout:  // is no product of a weight
        break;
    }
    return {Activation::x_value, Weight::wv, Weight::bv, Weight::wv, Weight::wv};
  };
  const Names names = names_of_tensor();
  const Activation in = activations_.contains(names.in) ? names.in : Activation::x;
  const std::int64_t features = heads_of(problem, tensor) * problem.head_dim;
  kernels::TransformTask after;
  if (tensor != Tensor::v) {
    take_norm(layer.qk_norm, names.norm_weight, names.norm_bias, features, after);
    after.rotary = layer.rotary;
    after.rotary_base = layer.rotary_base;
    after.head_dim = problem.head_dim;
    after.first_position = chunk.global;
  }
  const RingExecutor::RowPlace place = ring_.input_place(tensor, chunk.batch, chunk.global);
  ANNULUS_ASSERT(place.rows >= chunk.count, "{} rows lie together, and {} are projected", place.rows, chunk.count);
  multiply(chunk, {activation_rows(in, chunk), names.weight, names.bias, features_of(layer, in), features}, after, place.address);
}

void LayerExecutor::project() {
  begin_ = device_.record(queue_);
  for_each_chunk(resources_.chunk_rows(), [&](const Chunk& chunk) {
    for (const Tensor tensor : kSequenceTensors) { project(tensor, chunk); }
  });
  projected_ = device_.record(queue_);
}

void LayerExecutor::finish(const Chunk& chunk) {
  const Problem& problem = ring_.plan().problem;
  const Layer& layer = resources_.layer();
  const std::int64_t features = q_features(problem);
  const std::byte* rows = ring_.output_place(chunk.batch, chunk.global).address;
  if (layer.gate != Gate::none || layer.output_norm != Norm::none) {
    kernels::TransformTask task;
    task.rows = chunk.count;
    task.features = features;
    task.in_dtype = task.out_dtype = problem.dtype;
    task.in = rows;
    task.out = resources_.rows();
    take_norm(layer.output_norm, Weight::o_norm_weight, Weight::o_norm_bias, features, task);
    if (layer.gate != Gate::none) {
      kernels::LinearTask gate;
      gate.dtype = problem.dtype;
      gate.rows = chunk.count;
      gate.in_features = layer.embed;
      gate.out_features = features;
      gate.in = activation_rows(Activation::x, chunk);
      gate.weight = resources_.matrix(Weight::wg);
      gate.out = resources_.products();
      resources_.kernel().linear(queue_, gate);
      task.gate = layer.gate;
      task.gate_in = resources_.products();
      task.gate_bias = resources_.vector(Weight::bg);
      task.gate_temperature = layer.gate_temperature;
    }
    resources_.kernel().transform(queue_, task);
    rows = resources_.rows();
  }
  multiply(chunk, {rows, Weight::wo, Weight::bo, features, layer.embed}, {}, output_rows(chunk));
}

void LayerExecutor::finish() {
  attended_ = device_.record(queue_);
  for_each_chunk(resources_.chunk_rows(), [&](const Chunk& chunk) { finish(chunk); });
  end_ = device_.record(queue_);
}

double LayerExecutor::project_ms() {
  queue_.synchronize();
  return projected_->ms_since(*begin_);
}

double LayerExecutor::finish_ms() {
  queue_.synchronize();
  return end_->ms_since(*attended_);
}

double LayerExecutor::ms_since_begin_of(const LayerExecutor& first) {
  queue_.synchronize();
  return end_->ms_since(*first.begin_);
}

void LayerExecutor::read_output(std::int64_t batch, std::int64_t first, std::int64_t count, void* rows) {
  const std::int64_t row_bytes = resources_.layer().embed * size_of(ring_.plan().problem.dtype);
  device_.download(queue_, rows, output_.get() + (batch * ring_.plan().local_rows + first) * row_bytes, count * row_bytes);
  queue_.synchronize();
}

}  // namespace annulus
