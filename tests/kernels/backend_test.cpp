// SPDX-License-Identifier: Apache-2.0
// Every backend against `reference`, through the Device interface; built once per backend (see backends_under_test.hpp).
#include <annulus/core/error.hpp>
#include <annulus/device/device.hpp>
#include <annulus_test.hpp>

#include "attention/task_operations.hpp"
#include "backends_under_test.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace annulus {
namespace {

using kernels::AttendTask;
using kernels::Combine;
using kernels::Mask;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::uint64_t kSeed = 20240917;

std::size_t as_size(std::int64_t count) { return static_cast<std::size_t>(count); }

// --- numbers in a dtype ---------------------------------------------------------------------------------------------------------------

/// `value` rounded to the dtype and widened again.
float rounded(float value, DType dtype) {
  if (dtype == DType::fp16) { return kernels::from_fp16_bits(kernels::to_fp16_bits(value)); }
  return dtype == DType::bf16 ? kernels::from_bf16_bits(kernels::to_bf16_bits(value)) : value;
}

/// The bytes of a tensor of the dtype.
std::vector<std::byte> encoded(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * as_size(size_of(dtype)));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::fp32) {
      std::memcpy(bytes.data() + 4 * i, &values[i], 4);
    } else {
      const std::uint16_t bits = dtype == DType::fp16 ? kernels::to_fp16_bits(values[i]) : kernels::to_bf16_bits(values[i]);
      std::memcpy(bytes.data() + 2 * i, &bits, 2);
    }
  }
  return bytes;
}

std::vector<float> decoded(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / as_size(size_of(dtype)));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::fp32) {
      std::memcpy(&values[i], bytes.data() + 4 * i, 4);
    } else {
      std::uint16_t bits = 0;
      std::memcpy(&bits, bytes.data() + 2 * i, 2);
      values[i] = dtype == DType::fp16 ? kernels::from_fp16_bits(bits) : kernels::from_bf16_bits(bits);
    }
  }
  return values;
}

// --- a backend with a queue and the operations of its kernel ----------------------------------------------------------------------------

class Setup {
 public:
  explicit Setup(BackendKind kind, int threads = 2) {
    DeviceOptions options;
    options.kind = kind;
    options.threads = threads;
    backend_ = make_device(options);
    KernelOptions kernel;
    kernel.threads = threads;
    operations_ = make_task_operations(kernel, *backend_);
    queue_ = backend_->make_queue();
  }
  Device& backend() { return *backend_; }
  TaskOperations& operations() { return *operations_; }
  Queue& queue() { return *queue_; }
  bool is_double() const { return operations_->accumulator_bytes() == 8; }

  Buffer put(const std::vector<std::byte>& bytes) {
    Buffer buffer = backend_->allocate(static_cast<std::int64_t>(bytes.size()), MemoryUse::tensor);
    backend_->upload(*queue_, buffer.get(), bytes.data(), buffer.bytes());
    queue_->synchronize();
    return buffer;
  }
  std::vector<std::byte> get(const Buffer& buffer) {
    std::vector<std::byte> bytes(as_size(buffer.bytes()));
    backend_->download(*queue_, bytes.data(), buffer.get(), buffer.bytes());
    queue_->synchronize();
    return bytes;
  }
  /// Numbers in the precision of the backend's partials.
  Buffer put_numbers(const std::vector<double>& values) {
    std::vector<std::byte> bytes(values.size() * (is_double() ? 8U : 4U));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto narrow = static_cast<float>(values[i]);
      if (is_double()) {
        std::memcpy(bytes.data() + 8 * i, &values[i], 8);
      } else {
        std::memcpy(bytes.data() + 4 * i, &narrow, 4);
      }
    }
    return put(bytes);
  }
  std::vector<double> get_numbers(const Buffer& buffer) {
    const std::vector<std::byte> bytes = get(buffer);
    std::vector<double> values(bytes.size() / (is_double() ? 8U : 4U));
    for (std::size_t i = 0; i < values.size(); ++i) {
      float narrow = 0.0F;
      if (is_double()) {
        std::memcpy(&values[i], bytes.data() + 8 * i, 8);
      } else {
        std::memcpy(&narrow, bytes.data() + 4 * i, 4);
        values[i] = static_cast<double>(narrow);
      }
    }
    return values;
  }

 private:
  std::unique_ptr<Device> backend_;
  std::unique_ptr<TaskOperations> operations_;
  std::unique_ptr<Queue> queue_;
};

/// A contiguous partial on a setup.
struct Partial {
  Partial(Setup& setup, std::int64_t rows, std::int64_t head_dim)
      : acc(setup.backend().allocate(rows * head_dim * setup.operations().accumulator_bytes(), MemoryUse::tensor)),
        max(setup.backend().allocate(rows * setup.operations().accumulator_bytes(), MemoryUse::tensor)),
        sum(setup.backend().allocate(rows * setup.operations().accumulator_bytes(), MemoryUse::tensor)) {
    setup.operations().fill_identity(setup.queue(), pointers(), rows, head_dim);
  }
  Partial(Setup& setup, const std::vector<double>& acc_values, const std::vector<double>& max_values, const std::vector<double>& sum_values)
      : acc(setup.put_numbers(acc_values)), max(setup.put_numbers(max_values)), sum(setup.put_numbers(sum_values)) {}
  kernels::PartialPointers pointers() const { return {acc.get(), max.get(), sum.get()}; }

  Buffer acc;
  Buffer max;
  Buffer sum;
};

// --- an attention problem on one piece of memory --------------------------------------------------------------------------------------

/// Segments of a longer sequence: segment s holds rows s * segment_rows + offset + i * dilation, i < q_rows (k_rows).
struct Case {
  DType dtype = DType::fp32;
  Mask mask = Mask::none;
  std::int64_t batch = 1;
  std::int64_t segments = 1;
  std::int64_t q_rows = 1;
  std::int64_t k_rows = 1;
  std::int64_t kv_heads = 1;
  std::int64_t q_per_kv = 1;
  std::int64_t head_dim = 1;
  std::int64_t dilation = 1;
  std::int64_t offset = 0;
  std::int64_t first_query = 0;  ///< global position of the first query row; keys start at 0
  std::int64_t query_stride = 1;
  std::int64_t key_stride = 1;
  double scale = 1.0;
  std::vector<std::int64_t> chunks;  ///< sizes of the key chunks, folded one after another; empty: all keys at once

  std::int64_t heads() const { return kv_heads * q_per_kv; }
  std::int64_t q_segment() const { return q_rows * dilation + offset; }
  std::int64_t k_segment() const { return k_rows * dilation + offset; }
  std::int64_t q_seq() const { return segments * q_segment(); }
  std::int64_t k_seq() const { return segments * k_segment(); }
  std::int64_t partial_rows() const { return batch * heads() * q_seq(); }
  std::string text() const {
    return fmt::format(
        "{} {} batch {} segments {} q_rows {} k_rows {} kv_heads {} q_per_kv {} head_dim {} dilation {} offset {} first_query {} "
        "strides {} {} scale {} chunks {}",
        to_string(dtype), mask == Mask::causal ? "causal" : "full", batch, segments, q_rows, k_rows, kv_heads, q_per_kv, head_dim, dilation,
        offset, first_query, query_stride, key_stride, scale, chunks.size());
  }
};

/// q [batch, q_seq, heads, head_dim], k and v [batch, k_seq, kv_heads, head_dim]: already numbers of the case's dtype.
struct Inputs {
  std::vector<float> q;
  std::vector<float> k;
  std::vector<float> v;
};

Inputs random_inputs(const Case& c, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  const auto fill = [&](std::int64_t count) {
    std::vector<float> values(as_size(count));
    for (float& value : values) { value = rounded(normal(random), c.dtype); }
    return values;
  };
  Inputs inputs;
  inputs.q = fill(c.batch * c.q_seq() * c.heads() * c.head_dim);
  inputs.k = fill(c.batch * c.k_seq() * c.kv_heads * c.head_dim);
  inputs.v = fill(c.batch * c.k_seq() * c.kv_heads * c.head_dim);
  return inputs;
}

/// out [batch, q_seq, heads, head_dim], lse [batch, heads, q_seq], in fp64.
struct Outputs {
  std::vector<double> out;
  std::vector<double> lse;
};

/// Folds the case's keys into `partial` on the setup, chunk by chunk.
void attend(Setup& setup, const Case& c, const Inputs& inputs, const Partial& partial) {
  const Buffer q = setup.put(encoded(inputs.q, c.dtype));
  const Buffer k = setup.put(encoded(inputs.k, c.dtype));
  const Buffer v = setup.put(encoded(inputs.v, c.dtype));
  const std::int64_t element = size_of(c.dtype);
  const std::int64_t number = setup.operations().accumulator_bytes();
  const std::int64_t q_row = c.heads() * c.head_dim;
  const std::int64_t k_row = c.kv_heads * c.head_dim;

  AttendTask task;
  task.dtype = c.dtype;
  task.mask = c.mask;
  task.batch = c.batch;
  task.segments = c.segments;
  task.q_rows = c.q_rows;
  task.kv_heads = c.kv_heads;
  task.q_per_kv = c.q_per_kv;
  task.head_dim = c.head_dim;
  task.scale = c.scale;
  task.q_strides = {c.q_seq() * q_row, c.q_segment() * q_row, c.dilation * q_row, c.q_per_kv * c.head_dim, c.head_dim};
  task.acc_strides = task.q_strides;
  task.kv_strides = {c.k_seq() * k_row, c.k_segment() * k_row, c.dilation * k_row, c.head_dim, 0};
  task.stat_strides = {c.heads() * c.q_seq(), c.q_segment(), c.dilation, c.q_per_kv * c.q_seq(), c.q_seq()};
  task.q = q.get() + c.offset * q_row * element;
  task.acc = partial.acc.get() + c.offset * q_row * number;
  task.max = partial.max.get() + c.offset * number;
  task.sum = partial.sum.get() + c.offset * number;
  task.q_positions = {c.first_query, c.query_stride};
  task.k_positions = {0, c.key_stride};

  std::int64_t first_key = 0;
  for (const std::int64_t keys : c.chunks.empty() ? std::vector<std::int64_t>{c.k_rows} : c.chunks) {
    const std::int64_t at = (c.offset + first_key * c.dilation) * k_row * element;
    task.k_rows = keys;
    task.k = k.get() + at;
    task.v = v.get() + at;
    task.k_positions.first = first_key * c.key_stride;
    setup.operations().attend(setup.queue(), {&task, 1});
    first_key += keys;
  }
  setup.queue().synchronize();
}

Outputs finish(Setup& setup, const Case& c, const std::vector<const Partial*>& partials, Combine combine = Combine::lse,
               double output_scale = 1.0, int extra = -1) {
  Buffer out = setup.backend().allocate(c.partial_rows() * c.head_dim * size_of(c.dtype), MemoryUse::tensor);
  Buffer lse = setup.backend().allocate(c.partial_rows() * 4, MemoryUse::tensor);
  kernels::FinishTask task;
  task.dtype = c.dtype;
  task.combine = combine;
  task.batch = c.batch;
  task.rows = c.q_seq();
  task.heads = c.heads();
  task.head_dim = c.head_dim;
  task.output_scale = output_scale;
  task.partials = static_cast<int>(partials.size());
  task.extra = extra;
  for (std::size_t g = 0; g < partials.size(); ++g) { task.partial[g] = partials[g]->pointers(); }
  task.out = out.get();
  task.lse = reinterpret_cast<float*>(lse.get());
  setup.operations().finish(setup.queue(), task);
  const std::vector<float> out_values = decoded(setup.get(out), c.dtype);
  const std::vector<float> lse_values = decoded(setup.get(lse), DType::fp32);
  return {std::vector<double>(out_values.begin(), out_values.end()), std::vector<double>(lse_values.begin(), lse_values.end())};
}

Outputs run(Setup& setup, const Case& c, const Inputs& inputs) {
  const Partial partial(setup, c.partial_rows(), c.head_dim);
  attend(setup, c, inputs, partial);
  return finish(setup, c, {&partial});
}

/// The reference backend's partial, divided in fp64.
Outputs oracle(const Case& c, const Inputs& inputs) {
  Setup setup(BackendKind::reference);
  const Partial partial(setup, c.partial_rows(), c.head_dim);
  attend(setup, c, inputs, partial);
  Outputs result{setup.get_numbers(partial.acc), setup.get_numbers(partial.max)};
  const std::vector<double> sum = setup.get_numbers(partial.sum);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t row = 0; row < c.q_seq(); ++row) {
      for (std::int64_t head = 0; head < c.heads(); ++head) {
        const std::size_t stat = as_size((b * c.heads() + head) * c.q_seq() + row);
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          if (sum[stat] != 0.0) { result.out[as_size(((b * c.q_seq() + row) * c.heads() + head) * c.head_dim + d)] /= sum[stat]; }
        }
      }
    }
  }
  for (std::size_t i = 0; i < sum.size(); ++i) { result.lse[i] += sum[i] == 0.0 ? 0.0 : std::log(sum[i]); }
  return result;
}

/// A plain run: one pass over all keys in fp32, the output rounded once; probabilities rounded to the dtype first if the backend's are.
Outputs plain(const Case& c, const Inputs& inputs, bool round_probabilities) {
  Outputs result{std::vector<double>(as_size(c.partial_rows() * c.head_dim)), std::vector<double>(as_size(c.partial_rows()), -kInfinity)};
  std::vector<float> scores(as_size(c.k_rows));
  std::vector<float> acc(as_size(c.head_dim));
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t s = 0; s < c.segments; ++s) {
      for (std::int64_t head = 0; head < c.heads(); ++head) {
        for (std::int64_t i = 0; i < c.q_rows; ++i) {
          const std::int64_t row = s * c.q_segment() + c.offset + i * c.dilation;
          const std::int64_t q_at = ((b * c.q_seq() + row) * c.heads() + head) * c.head_dim;
          const auto k_at = [&](std::int64_t j) {
            return ((b * c.k_seq() + s * c.k_segment() + c.offset + j * c.dilation) * c.kv_heads + head / c.q_per_kv) * c.head_dim;
          };
          float max = -std::numeric_limits<float>::infinity();
          std::int64_t seen = 0;
          for (std::int64_t j = 0; j < c.k_rows; ++j) {
            if (c.mask == Mask::causal && j * c.key_stride > c.first_query + i * c.query_stride) { break; }
            float score = 0.0F;
            for (std::int64_t d = 0; d < c.head_dim; ++d) { score += inputs.q[as_size(q_at + d)] * inputs.k[as_size(k_at(j) + d)]; }
            scores[as_size(j)] = score * static_cast<float>(c.scale);
            max = std::max(max, scores[as_size(j)]);
            ++seen;
          }
          if (max == -std::numeric_limits<float>::infinity()) { continue; }
          float sum = 0.0F;
          std::fill(acc.begin(), acc.end(), 0.0F);
          for (std::int64_t j = 0; j < seen; ++j) {
            const float probability = std::exp(scores[as_size(j)] - max);
            sum += probability;
            const float weight = round_probabilities ? rounded(probability, c.dtype) : probability;
            for (std::int64_t d = 0; d < c.head_dim; ++d) { acc[as_size(d)] += weight * inputs.v[as_size(k_at(j) + d)]; }
          }
          for (std::int64_t d = 0; d < c.head_dim; ++d) {
            result.out[as_size(q_at + d)] = static_cast<double>(rounded(acc[as_size(d)] / sum, c.dtype));
          }
          result.lse[as_size((b * c.heads() + head) * c.q_seq() + row)] = static_cast<double>(max + std::log(sum));
        }
      }
    }
  }
  return result;
}

// --- comparison -----------------------------------------------------------------------------------------------------------------------

double rms(const std::vector<double>& values) {
  double squares = 0.0;
  for (const double value : values) { squares += value * value; }
  return values.empty() ? 0.0 : std::sqrt(squares / static_cast<double>(values.size()));
}

double rms_difference(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> difference(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) { difference[i] = a[i] - b[i]; }
  return rms(difference);
}

/// Places where one of them is NaN or infinite and the other is not the same.
std::int64_t non_finite_mismatches(const std::vector<double>& a, const std::vector<double>& b) {
  std::int64_t count = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const bool same = std::isnan(a[i]) ? std::isnan(b[i]) : std::isinf(a[i]) ? a[i] == b[i] : std::isfinite(b[i]);
    if (!same) { ++count; }
  }
  return count;
}

/// The difference of LSEs where both are finite.
double max_lse_error(const Outputs& a, const Outputs& b) {
  double error = 0.0;
  for (std::size_t i = 0; i < a.lse.size(); ++i) {
    if (std::isfinite(a.lse[i])) { error = std::max(error, std::abs(a.lse[i] - b.lse[i])); }
  }
  return error;
}

double max_abs(const std::vector<double>& values) {
  double largest = 0.0;
  for (const double value : values) {
    if (std::isfinite(value)) { largest = std::max(largest, std::abs(value)); }
  }
  return largest;
}

/// Checks a backend's result against the reference's: twice the error of a plain fp32 run, 1.2 times that of a plain 16-bit run, and a
/// floor of one rounding to fp32. `max_score` bounds the scores.
void check_against_reference(Setup& setup, const Case& c, const Inputs& inputs, double max_score) {
  INFO(setup.operations().describe());
  INFO(c.text());

  const Outputs result = run(setup, c, inputs);

  const Outputs expected = oracle(c, inputs);
  const Outputs plain_run = plain(c, inputs, setup.operations().rounds_probabilities(c.dtype));
  CHECK(non_finite_mismatches(result.out, expected.out) == 0);
  CHECK(non_finite_mismatches(result.lse, expected.lse) == 0);
  const double factor = c.dtype == DType::fp32 ? 2.0 : 1.2;
  const double limit = factor * rms_difference(plain_run.out, expected.out) + 0x1p-24 * rms(expected.out);
  CHECK(rms_difference(result.out, expected.out) <= limit);
  CHECK(max_lse_error(expected, result) <= 1e-5 + 0x1p-21 * max_score);
}

constexpr std::array<DType, 3> kDTypes{DType::fp32, DType::fp16, DType::bf16};

// --- attention ------------------------------------------------------------------------------------------------------------------------

TEST_CASE("attend agrees with reference on random problems", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  const auto between = [&](std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  constexpr std::array<std::int64_t, 14> kHeadDims{1, 2, 3, 7, 8, 16, 31, 33, 64, 72, 96, 128, 129, 256};
  for (int number = 0; number < 90; ++number) {
    INFO("seed " << kSeed << " case " << number);
    Case c;
    c.dtype = kDTypes[as_size(number % 3)];
    c.mask = between(0, 1) == 0 ? Mask::none : Mask::causal;
    c.head_dim = kHeadDims[as_size(between(0, kHeadDims.size() - 1))];
    c.batch = between(1, 2);
    c.segments = between(1, 3);
    c.kv_heads = between(1, 2);
    c.q_per_kv = between(1, 3);
    c.q_rows = between(0, 3) == 0 ? between(1, 4) : between(1, 150);
    c.k_rows = between(0, 3) == 0 ? between(1, 4) : between(1, 300);
    c.dilation = between(1, 3);
    c.offset = between(0, 2);
    c.first_query = between(-10, c.k_rows);
    c.query_stride = between(1, 4);
    c.key_stride = between(1, 4);
    c.scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
    for (std::int64_t left = between(0, 1) == 0 ? 0 : c.k_rows; left > 0;) {
      c.chunks.push_back(between(1, left));
      left -= c.chunks.back();
    }

    check_against_reference(setup, c, random_inputs(c, random), 8.0);
  }
}

TEST_CASE("attend with shapes around a tile's edge agrees with reference", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const std::int64_t k_rows = GENERATE(127, 128, 129, 256, 257);
  const std::int64_t q_rows = GENERATE(63, 64, 65);
  const Mask mask = GENERATE(Mask::none, Mask::causal);
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.mask = mask;
  c.q_rows = q_rows;
  c.k_rows = k_rows;
  c.head_dim = 16;
  c.first_query = k_rows - q_rows;
  c.scale = 0.25;

  check_against_reference(setup, c, random_inputs(c, random), 8.0);
}

TEST_CASE("attend keeps fp32 accuracy over 8192 keys", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.q_rows = 67;
  c.k_rows = 8192;
  c.head_dim = 128;
  c.scale = 1.0 / std::sqrt(128.0);
  const Inputs inputs = random_inputs(c, random);

  const Outputs result = run(setup, c, inputs);

  const Outputs expected = oracle(c, inputs);
  INFO(setup.operations().describe());
  CHECK(rms_difference(result.out, expected.out) <= 2e-6 * rms(expected.out));
  CHECK(max_lse_error(expected, result) <= 1e-5);
}

TEST_CASE("attend resolves scores of ten thousand as well as a plain run", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const DType dtype = GENERATE(from_range(kDTypes.begin(), kDTypes.end()));
  const Mask mask = GENERATE(Mask::none, Mask::causal);
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.dtype = dtype;
  c.mask = mask;
  c.q_rows = 200;
  c.k_rows = 400;
  c.kv_heads = 2;
  c.head_dim = 64;
  c.first_query = 150;
  c.scale = 310.0;  // scores are normal with a standard deviation of 8 * 310: the largest pass 10000
  c.chunks = {150, 250};

  check_against_reference(setup, c, random_inputs(c, random), 1.3e4);
}

TEST_CASE("attend gives a constant value back when all keys are equal", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const DType dtype = GENERATE(from_range(kDTypes.begin(), kDTypes.end()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.dtype = dtype;
  c.q_rows = 70;
  c.k_rows = 130;
  c.head_dim = 32;
  Inputs inputs = random_inputs(c, random);
  for (std::size_t i = 0; i < inputs.k.size(); ++i) {
    inputs.k[i] = inputs.k[i % 32];
    inputs.v[i] = 1.25F;
  }

  const Outputs result = run(setup, c, inputs);

  // Not exactly: a product library may round the scores of a tile's edge in another order.
  const std::vector<double> constant(result.out.size(), 1.25);
  CHECK(non_finite_mismatches(result.out, constant) == 0);
  CHECK(rms_difference(result.out, constant) <= 0x1p-22);
  CHECK(max_lse_error(oracle(c, inputs), result) <= 1e-5 + 0x1p-21 * 40.0);
}

TEST_CASE("attend with a scale of zero is the mean of the values", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.q_rows = 5;
  c.k_rows = 77;
  c.head_dim = 8;
  c.scale = 0.0;
  const Inputs inputs = random_inputs(c, random);

  const Outputs result = run(setup, c, inputs);

  CHECK(result.lse == std::vector<double>(5, static_cast<double>(static_cast<float>(std::log(77.0)))));
  CHECK(rms_difference(result.out, oracle(c, inputs).out) <= 0x1p-22);
}

TEST_CASE("attend with a scale of zero gives a constant value back exactly", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const DType dtype = GENERATE(from_range(kDTypes.begin(), kDTypes.end()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.dtype = dtype;
  c.q_rows = 70;
  c.k_rows = 130;
  c.head_dim = 32;
  c.scale = 0.0;
  Inputs inputs = random_inputs(c, random);
  std::fill(inputs.v.begin(), inputs.v.end(), 1.25F);

  const Outputs result = run(setup, c, inputs);

  CHECK(result.out == std::vector<double>(result.out.size(), 1.25));
}

TEST_CASE("attend with one visible key returns its value exactly", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const DType dtype = GENERATE(from_range(kDTypes.begin(), kDTypes.end()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.dtype = dtype;
  c.mask = Mask::causal;
  c.k_rows = 200;
  c.head_dim = 40;
  const Inputs inputs = random_inputs(c, random);

  const Outputs result = run(setup, c, inputs);

  CHECK(result.out == std::vector<double>(inputs.v.begin(), inputs.v.begin() + 40));
}

TEST_CASE("attend leaves the partial of a row untouched that sees no key", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.mask = Mask::causal;
  c.q_rows = 90;
  c.k_rows = 30;
  c.head_dim = 24;
  c.first_query = -75;  // rows below 75 see nothing
  const Inputs inputs = random_inputs(c, random);
  std::vector<double> acc(90 * 24);
  for (std::size_t i = 0; i < acc.size(); ++i) { acc[i] = static_cast<double>(i) * 0.5; }
  const std::vector<double> max(90, -3.5);
  const std::vector<double> sum(90, 2.0);
  const Partial partial(setup, acc, max, sum);

  attend(setup, c, inputs, partial);

  const std::vector<double> acc_after = setup.get_numbers(partial.acc);
  CHECK(std::equal(acc.begin(), acc.begin() + 75 * 24, acc_after.begin()));
  CHECK(std::vector<double>(75, -3.5) == [&] {
    auto all = setup.get_numbers(partial.max);
    all.resize(75);
    return all;
  }());
  CHECK(std::vector<double>(75, 2.0) == [&] {
    auto all = setup.get_numbers(partial.sum);
    all.resize(75);
    return all;
  }());
  CHECK(setup.get_numbers(partial.sum)[75] > 2.0 * std::exp(-3.5));
}

TEST_CASE("attend carries NaN and infinity to the rows that see them and to no other", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const DType dtype = GENERATE(from_range(kDTypes.begin(), kDTypes.end()));
  const Mask mask = GENERATE(Mask::none, Mask::causal);
  const float bad = GENERATE(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity());
  const int operand = GENERATE(0, 1, 2);
  INFO("operand " << "qkv"[operand] << " bad " << bad);
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.dtype = dtype;
  c.mask = mask;
  c.q_rows = 150;
  c.k_rows = 150;
  c.head_dim = 20;
  c.scale = 0.1;
  Inputs inputs = random_inputs(c, random);
  std::vector<float>& poisoned = operand == 0 ? inputs.q : operand == 1 ? inputs.k : inputs.v;
  poisoned[141 * 20 + 7] = bad;
  poisoned[60 * 20 + 3] = bad;

  Outputs result = run(setup, c, inputs);

  INFO(c.text());
  const Outputs expected = oracle(c, inputs);
  // The limit that cuda.hpp states: a masked key's V is multiplied by 0. Rows that do not see it are not looked at, in its column alone.
  if (kind == BackendKind::cuda && mask == Mask::causal && operand == 2) {
    for (std::size_t i = 0; i < result.out.size(); ++i) {
      const bool poisoned_column = i % 20 == 3 || i % 20 == 7;
      if (poisoned_column && std::isfinite(expected.out[i])) { result.out[i] = expected.out[i]; }
    }
  }
  CHECK(non_finite_mismatches(result.out, expected.out) == 0);
  CHECK(non_finite_mismatches(result.lse, expected.lse) == 0);
}

TEST_CASE("attend gives a score of minus infinity no weight, whichever chunk it comes in", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const std::int64_t first_chunk = GENERATE(4, 20);
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.mask = Mask::causal;  // the first four rows see no other score
  c.q_rows = 24;
  c.k_rows = 24;
  c.head_dim = 8;
  c.chunks = {first_chunk, 24 - first_chunk};
  Inputs inputs = random_inputs(c, random);
  for (std::size_t row = 0; row < 24; ++row) { inputs.q[row * 8] = 1.0F; }
  for (const std::size_t row : {0, 1, 2, 3, 10}) { inputs.k[row * 8] = -std::numeric_limits<float>::infinity(); }

  check_against_reference(setup, c, inputs, 30.0);

  const Outputs result = run(setup, c, inputs);
  CHECK(std::vector<double>(result.lse.begin(), result.lse.begin() + 4) == std::vector<double>(4, -kInfinity));
}

// --- partials -------------------------------------------------------------------------------------------------------------------------

/// A partial's numbers on the host: acc [batch, rows, heads, head_dim], max and sum [batch, heads, rows].
struct HostPartial {
  std::vector<double> acc;
  std::vector<double> max;
  std::vector<double> sum;
};

/// Random fp32 numbers; about a third of the rows is empty.
HostPartial random_partial(const Case& c, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(1.0, 50.0);
  const std::int64_t rows = c.partial_rows();
  HostPartial partial{std::vector<double>(as_size(rows * c.head_dim)), std::vector<double>(as_size(rows), -kInfinity),
                      std::vector<double>(as_size(rows))};
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t head = 0; head < c.heads(); ++head) {
      for (std::int64_t row = 0; row < c.q_seq(); ++row) {
        if (random() % 3 == 0) { continue; }
        const std::size_t stat = as_size((b * c.heads() + head) * c.q_seq() + row);
        partial.max[stat] = static_cast<double>(static_cast<float>(5.0 * normal(random)));
        partial.sum[stat] = static_cast<double>(static_cast<float>(uniform(random)));
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          partial.acc[as_size(((b * c.q_seq() + row) * c.heads() + head) * c.head_dim + d)] =
              static_cast<double>(static_cast<float>(partial.sum[stat] * normal(random)));
        }
      }
    }
  }
  return partial;
}

Partial on(Setup& setup, const HostPartial& host) { return {setup, host.acc, host.max, host.sum}; }

/// Batch 2, heads 3, an odd number of rows.
Case partial_case(DType dtype = DType::fp32) {
  Case c;
  c.dtype = dtype;
  c.batch = 2;
  c.kv_heads = 3;
  c.q_rows = 101;
  c.head_dim = 37;
  return c;
}

TEST_CASE("fill_identity writes the empty partial over whatever was there", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  const Case c = partial_case();
  const Partial partial = on(setup, random_partial(c, random));

  setup.operations().fill_identity(setup.queue(), partial.pointers(), c.partial_rows(), c.head_dim);

  CHECK(setup.get_numbers(partial.acc) == std::vector<double>(as_size(c.partial_rows() * c.head_dim), 0.0));
  CHECK(setup.get_numbers(partial.max) == std::vector<double>(as_size(c.partial_rows()), -kInfinity));
  CHECK(setup.get_numbers(partial.sum) == std::vector<double>(as_size(c.partial_rows()), 0.0));
}

TEST_CASE("keys of zeros are where a row's sum begins, for the rows of the task and no others", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  // Rows 1, 4, 7 and, a segment later, 11, 14, 17 of 20; heads 1 and 2 of a second group of three; batch 2.
  const std::int64_t rows = 20;
  const std::int64_t heads = 6;
  const std::int64_t batch = 2;
  const Partial partial(setup, batch * heads * rows, 3);
  const std::int64_t number = setup.operations().accumulator_bytes();
  kernels::ZeroKeysTask task;
  task.count = 3;
  task.batch = batch;
  task.segments = 2;
  task.rows = 3;
  task.kv_heads = 2;
  task.q_per_kv = 2;
  task.strides = {heads * rows, 10, 3, 3 * rows, rows};
  task.max = partial.max.get() + (rows + 1) * number;
  task.sum = partial.sum.get() + (rows + 1) * number;
  kernels::ZeroKeysTask more = task;
  more.count = 4;

  setup.operations().add_zero_keys(setup.queue(), std::vector<kernels::ZeroKeysTask>{task, more});

  const std::vector<double> max = setup.get_numbers(partial.max);
  const std::vector<double> sum = setup.get_numbers(partial.sum);
  CHECK(setup.get_numbers(partial.acc) == std::vector<double>(as_size(batch * heads * rows * 3), 0.0));
  for (std::int64_t i = 0; i < batch * heads * rows; ++i) {
    const std::int64_t row = i % rows % 10;
    const bool touched = (row == 1 || row == 4 || row == 7) && i / rows % 3 != 0;
    INFO("number " << i);
    CHECK(max[as_size(i)] == (touched ? 0.0 : -kInfinity));
    CHECK(sum[as_size(i)] == (touched ? 7.0 : 0.0));
  }
}

TEST_CASE("finishing three partials in any order is their fp64 softmax", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  const Case c = partial_case();
  std::array<HostPartial, 3> parts;
  for (HostPartial& part : parts) { part = random_partial(c, random); }
  // One softmax over all three, in fp64: the finish of the reference backend.
  Setup reference(BackendKind::reference);
  const std::array<Partial, 3> exact{on(reference, parts[0]), on(reference, parts[1]), on(reference, parts[2])};
  const Outputs expected = finish(reference, c, {&exact[0], &exact[1], &exact[2]}, Combine::lse);

  std::array<std::size_t, 3> order{0, 1, 2};
  const std::array<Partial, 3> found{on(setup, parts[0]), on(setup, parts[1]), on(setup, parts[2])};
  do {
    const Outputs result = finish(setup, c, {&found[order[0]], &found[order[1]], &found[order[2]]}, Combine::lse);

    INFO("order " << order[0] << order[1] << order[2]);
    CHECK(non_finite_mismatches(result.out, expected.out) == 0);
    CHECK(non_finite_mismatches(result.lse, expected.lse) == 0);
    CHECK(rms_difference(result.out, expected.out) <= 0x1p-23 * rms(expected.out));
    CHECK(max_lse_error(expected, result) <= 0x1p-22 * max_abs(expected.lse));
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST_CASE("attending parts one after the other is attending all keys", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Case c;
  c.mask = Mask::causal;
  c.q_rows = 130;
  c.k_rows = 130;
  c.q_per_kv = 2;
  c.head_dim = 64;
  c.scale = 0.125;
  Inputs inputs = random_inputs(c, random);
  const Partial into(setup, c.partial_rows(), c.head_dim);
  for (const std::int64_t keys : {50, 80}) {  // keys 0..49, then 50..129: the first query rows see none of the second part
    Case half = c;
    half.k_rows = keys;
    half.first_query = keys == 50 ? 0 : -50;
    Inputs own = inputs;
    own.k.assign(inputs.k.begin() + (keys == 50 ? 0 : 50 * 64), inputs.k.end());
    own.v.assign(inputs.v.begin() + (keys == 50 ? 0 : 50 * 64), inputs.v.end());
    attend(setup, half, own, into);
  }

  const Outputs result = finish(setup, c, {&into});

  const Outputs expected = oracle(c, inputs);
  CHECK(rms_difference(result.out, expected.out) <=
        2.0 * rms_difference(plain(c, inputs, false).out, expected.out) + 0x1p-24 * rms(expected.out));
  CHECK(max_lse_error(expected, result) <= 1e-5);
}

TEST_CASE("finish combines branches as reference does and rounds once", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const DType dtype = GENERATE(from_range(kDTypes.begin(), kDTypes.end()));
  const Combine combine = GENERATE(Combine::lse, Combine::mean, Combine::sum);
  const int branches = GENERATE(1, 2, 5);
  const double output_scale = GENERATE(1.0, 0.2);
  const bool last_is_extra = GENERATE(false, true);
  const int extra = last_is_extra ? branches - 1 : -1;
  Setup setup(kind);
  Setup reference(BackendKind::reference);
  std::mt19937_64 random(kSeed);
  const Case c = partial_case(dtype);
  std::vector<Partial> partials;
  std::vector<Partial> exact;
  for (int g = 0; g < branches; ++g) {
    const HostPartial host = random_partial(c, random);
    partials.push_back(on(setup, host));
    exact.push_back(on(reference, host));
  }
  std::vector<const Partial*> pointers;
  std::vector<const Partial*> exact_pointers;
  for (std::size_t g = 0; g < partials.size(); ++g) {
    pointers.push_back(&partials[g]);
    exact_pointers.push_back(&exact[g]);
  }

  const Outputs result = finish(setup, c, pointers, combine, output_scale, extra);

  Case in_fp32 = c;
  in_fp32.dtype = DType::fp32;
  const Outputs expected = finish(reference, in_fp32, exact_pointers, combine, output_scale, extra);
  Outputs once = expected;
  for (double& value : once.out) { value = static_cast<double>(rounded(static_cast<float>(value), dtype)); }
  INFO("branches " << branches << " scale " << output_scale << " " << to_string(dtype));
  CHECK(non_finite_mismatches(result.out, expected.out) == 0);
  CHECK(non_finite_mismatches(result.lse, expected.lse) == 0);
  CHECK(rms_difference(result.out, expected.out) <= 1.01 * rms_difference(once.out, expected.out) + 0x1p-23 * rms(expected.out));
  CHECK(max_lse_error(expected, result) <= 0x1p-22 * max_abs(expected.lse));
}

TEST_CASE("finish gives zero and minus infinity for a row that nothing covers", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const DType dtype = GENERATE(from_range(kDTypes.begin(), kDTypes.end()));
  const Combine combine = GENERATE(Combine::lse, Combine::mean, Combine::sum);
  Setup setup(kind);
  const Case c = partial_case(dtype);
  const Partial first(setup, c.partial_rows(), c.head_dim);
  const Partial second(setup, c.partial_rows(), c.head_dim);

  const Outputs result = finish(setup, c, {&first, &second}, combine);

  CHECK(result.out == std::vector<double>(result.out.size(), 0.0));
  CHECK(result.lse == std::vector<double>(result.lse.size(), -kInfinity));
}

// --- memory ---------------------------------------------------------------------------------------------------------------------------

TEST_CASE("pack gathers strided rows bit for bit", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  const std::int64_t element_size = GENERATE(2, 4);
  const std::int64_t head_dim = GENERATE(1, 5, 64, 130);
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  // src [batch 2, seq 60, heads 5, head_dim]: rows 2, 5, 8, ... and heads 1, 3.
  std::vector<std::byte> host(as_size(2 * 60 * 5 * head_dim * element_size));
  for (std::byte& byte : host) { byte = static_cast<std::byte>(random()); }
  const Buffer src = setup.put(host);
  const Buffer dst = setup.backend().allocate(2 * 19 * 2 * head_dim * element_size, MemoryUse::slot);
  kernels::PackTask task;
  task.element_size = element_size;
  task.batch = 2;
  task.rows = 19;
  task.heads = 2;
  task.head_dim = head_dim;
  task.src = src.get() + (2 * 5 + 1) * head_dim * element_size;
  task.dst = dst.get();
  task.src_batch_stride = 60 * 5 * head_dim;
  task.src_row_stride = 3 * 5 * head_dim;
  task.src_head_stride = 2 * head_dim;

  setup.backend().pack(setup.queue(), {&task, 1});

  const std::vector<std::byte> packed = setup.get(dst);
  std::vector<std::byte> expected;
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t row = 2; row < 2 + 19 * 3; row += 3) {
      for (const std::int64_t head : {1, 3}) {
        const auto at = host.begin() + ((b * 60 + row) * 5 + head) * head_dim * element_size;
        expected.insert(expected.end(), at, at + head_dim * element_size);
      }
    }
  }
  CHECK(packed == expected);
}

TEST_CASE("memory is accounted, and attend takes no more workspace than predicted", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  std::mt19937_64 random(kSeed);
  Device& backend = setup.backend();
  const std::int64_t before = backend.memory().in_use;
  {
    const Buffer first = backend.allocate(1000, MemoryUse::tensor);
    const Buffer second = backend.allocate(std::int64_t{5} << 20, MemoryUse::slot);
    CHECK(backend.memory().in_use >= before + 1000 + (std::int64_t{5} << 20));
  }
  CHECK(backend.memory().in_use == before);
  CHECK(backend.memory().high_water >= before + (std::int64_t{5} << 20));
  backend.reset_high_water();
  CHECK(backend.memory().high_water == before);

  Case c;
  c.q_rows = 100;
  c.k_rows = 100;
  c.head_dim = 80;
  run(setup, c, random_inputs(c, random));

  CHECK(backend.memory().in_use <= before + setup.operations().workspace_bytes(80, DType::fp32));
}

TEST_CASE("an allocation beyond the memory there is fails with the numbers", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  const std::int64_t bytes = std::int64_t{1} << 50;

  try {
    const Buffer buffer = setup.backend().allocate(bytes, MemoryUse::tensor);
    FAIL("1 PiB was granted");
  } catch (const RuntimeFailure& failure) {
    INFO(failure.what());
    CHECK(std::string(failure.what()).find(std::to_string(bytes)) != std::string::npos);
  }
}

TEST_CASE("copies and events follow the queue", "[backend]") {
  const BackendKind kind = GENERATE(from_range(test::backends_under_test()));
  Setup setup(kind);
  const std::vector<std::byte> host{std::byte{1}, std::byte{2}, std::byte{3}};
  const Buffer from = setup.put(host);
  const Buffer to = setup.backend().allocate(3, MemoryUse::tensor);

  const std::unique_ptr<Event> start = setup.backend().record(setup.queue());
  setup.backend().copy(setup.queue(), to.get(), from.get(), 3);
  const std::unique_ptr<Event> end = setup.backend().record(setup.queue());
  setup.backend().wait(setup.queue(), *end);
  end->synchronize();

  CHECK(setup.get(to) == host);
  CHECK(end->reached());
  CHECK(end->ms_since(*start) >= 0.0);
}

}  // namespace
}  // namespace annulus
