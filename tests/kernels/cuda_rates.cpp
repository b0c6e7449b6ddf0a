// SPDX-License-Identifier: Apache-2.0
// Rates of the cuda kernels on the GPU at hand, each proved against fp64 on the host first:
//   annulus_cuda_rates [--check-only] [--sweep] [--device N]
// --sweep times tilings of the unfused attention and prints the best for each shape. Exit code 1 if a check failed, 77 without a GPU.
#include <annulus/kernels/cublas.hpp>
#include <annulus/kernels/cuda.hpp>
#include <annulus/kernels/dtype.hpp>

#include "device_memory.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace annulus {
namespace {

namespace gpu = kernels::cuda;
using kernels::AttendTask;
using kernels::Mask;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) { return; }
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

const char* name_of(DType dtype) { return dtype == DType::fp32 ? "fp32" : dtype == DType::fp16 ? "fp16" : "bf16"; }

// The attention records a graph in the second call of a task list and launches it from the third on.
constexpr int kWarmCalls = 4;

/// Median milliseconds of `body`, which enqueues on `stream`, once warm; `before` runs untimed ahead of each.
double median_ms(cudaStream_t stream, int repetitions, const std::function<void()>& before, const std::function<void()>& body) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  must(cudaEventCreate(&begin), "event");
  must(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int i = -kWarmCalls; i < repetitions; ++i) {
    before();
    must(cudaEventRecord(begin, stream), "record");
    body();
    must(cudaEventRecord(end, stream), "record");
    must(cudaEventSynchronize(end), "synchronise");
    float ms = 0.0F;
    must(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    if (i >= 0) { times.push_back(static_cast<double>(ms)); }
  }
  static_cast<void>(cudaEventDestroy(begin));
  static_cast<void>(cudaEventDestroy(end));
  return median(times);
}

// --- attention -------------------------------------------------------------------------------------------------------------------------

/// q [seq, heads, d], k and v [seq, kv_heads, d], acc as q, max and sum [heads, seq]; branch (w, r) with offset (kv head mod r).
struct Shape {
  DType dtype = DType::bf16;
  std::int64_t seq = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  Mask mask = Mask::none;
  std::vector<std::array<std::int64_t, 2>> branches;  ///< (segment length, dilation rate); lengths divide seq, rates divide lengths

  std::int64_t group() const { return heads / kv_heads; }
  std::int64_t rows() const { return seq * heads; }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }

  double flops() const {
    double pairs = 0.0;
    for (const auto& [w, r] : branches) {
      const auto rows_of_segment = static_cast<double>(w / r);
      const double of_segment = mask == Mask::causal ? rows_of_segment * (rows_of_segment + 1) / 2 : rows_of_segment * rows_of_segment;
      pairs += of_segment * static_cast<double>(seq / w) * static_cast<double>(heads);
    }
    return 4.0 * static_cast<double>(head_dim) * pairs;
  }
};

struct Operands {
  const std::byte* q;
  const std::byte* k;
  const std::byte* v;
  float* acc;
  float* max;
  float* sum;
};

/// One task per branch and offset.
std::vector<AttendTask> tasks_of(const Shape& shape, const Operands& at) {
  std::vector<AttendTask> tasks;
  const std::int64_t d = shape.head_dim;
  const std::int64_t q_pitch = shape.heads * d;
  const std::int64_t kv_pitch = shape.kv_heads * d;
  const std::int64_t size = size_of(shape.dtype);
  for (const auto& [w, r] : shape.branches) {
    for (std::int64_t o = 0; o < std::min(r, shape.kv_heads); ++o) {
      AttendTask task;
      task.dtype = shape.dtype;
      task.mask = shape.mask;
      task.batch = 1;
      task.segments = shape.seq / w;
      task.q_rows = w / r;
      task.k_rows = w / r;
      task.kv_heads = (shape.kv_heads - o + r - 1) / r;
      task.q_per_kv = shape.group();
      task.head_dim = d;
      task.scale = shape.scale();
      const std::int64_t q_first = o * q_pitch + o * shape.group() * d;
      const std::int64_t kv_first = o * kv_pitch + o * d;
      task.q = at.q + q_first * size;
      task.k = at.k + kv_first * size;
      task.v = at.v + kv_first * size;
      task.acc = at.acc + q_first;
      task.max = at.max + o * shape.group() * shape.seq + o;
      task.sum = at.sum + o * shape.group() * shape.seq + o;
      task.q_strides = {shape.seq * q_pitch, w * q_pitch, r * q_pitch, r * shape.group() * d, d};
      task.kv_strides = {shape.seq * kv_pitch, w * kv_pitch, r * kv_pitch, r * d, 0};
      task.acc_strides = task.q_strides;
      task.stat_strides = {shape.rows(), w, r, r * shape.group() * shape.seq, shape.seq};
      task.q_positions = {o, r};
      task.k_positions = {o, r};
      tasks.push_back(task);
    }
  }
  return tasks;
}

/// Attention of one row and head in fp64, over the keys of all branches together. @returns whether the row sees a key
bool exact_row(const Shape& shape, const Noise& noise, const std::array<std::int64_t, 3>& offsets, std::int64_t row, std::int64_t head,
               std::vector<double>& out, double& lse) {
  const std::int64_t d = shape.head_dim;
  const std::int64_t kv_head = head / shape.group();
  std::vector<std::int64_t> keys;
  for (const auto& [w, r] : shape.branches) {
    const std::int64_t start = row / w * w;
    if ((row - start) % r != kv_head % r) { continue; }
    for (std::int64_t key = start + kv_head % r; key < start + w; key += r) {
      if (shape.mask == Mask::none || key <= row) { keys.push_back(key); }
    }
  }
  std::vector<double> scores;
  double max = -kInfinity;
  for (const std::int64_t key : keys) {
    double dot = 0.0;
    for (std::int64_t i = 0; i < d; ++i) {
      dot += static_cast<double>(noise.at(offsets[0] + (row * shape.heads + head) * d + i)) *
             static_cast<double>(noise.at(offsets[1] + (key * shape.kv_heads + kv_head) * d + i));
    }
    scores.push_back(dot * shape.scale());
    max = std::max(max, scores.back());
  }
  out.assign(as_size(d), 0.0);
  double sum = 0.0;
  for (std::size_t j = 0; j < keys.size(); ++j) {
    const double p = std::exp(scores[j] - max);
    sum += p;
    for (std::int64_t i = 0; i < d; ++i) {
      out[as_size(i)] += p * static_cast<double>(noise.at(offsets[2] + (keys[j] * shape.kv_heads + kv_head) * d + i));
    }
  }
  for (double& value : out) { value = keys.empty() ? 0.0 : value / sum; }
  lse = max + std::log(sum);
  return !keys.empty();
}

struct Errors {
  double rms = 0.0;  ///< of O, relative to max(RMS(O), 0.1)
  double lse = 0.0;  ///< largest
};

/// A problem in device memory.
class Problem {
 public:
  Problem(const Shape& shape, const Noise& noise)
      : shape_(shape),
        noise_(&noise),
        offsets_{0, 1000003, 2000003},
        q_(repeated(noise, shape.dtype, shape.rows() * shape.head_dim, offsets_[0])),
        k_(repeated(noise, shape.dtype, shape.seq * shape.kv_heads * shape.head_dim, offsets_[1])),
        v_(repeated(noise, shape.dtype, shape.seq * shape.kv_heads * shape.head_dim, offsets_[2])),
        acc_(shape.rows() * shape.head_dim * 4),
        max_(shape.rows() * 4),
        sum_(shape.rows() * 4),
        out_(shape.rows() * shape.head_dim * 4),
        lse_(shape.rows() * 4) {}

  const Shape& shape() const { return shape_; }
  std::vector<AttendTask> tasks() const {
    return tasks_of(shape_, {q_.get(), k_.get(), v_.get(), acc_.get<float>(), max_.get<float>(), sum_.get<float>()});
  }
  void reset(cudaStream_t stream) const { gpu::fill_identity(partial(), shape_.rows(), shape_.head_dim, stream); }
  kernels::PartialPointers partial() const { return {acc_.get(), max_.get(), sum_.get()}; }
  /// acc, max and sum, bit for bit.
  std::vector<std::byte> partial_bytes() const {
    std::vector<std::byte> bytes = acc_.host<std::byte>();
    for (const DeviceMemory* statistic : {&max_, &sum_}) {
      const std::vector<std::byte> more = statistic->host<std::byte>();
      bytes.insert(bytes.end(), more.begin(), more.end());
    }
    return bytes;
  }

  /// Finishes the partial in fp32 and compares `samples` rows with fp64.
  Errors errors(cudaStream_t stream, int samples) const {
    kernels::FinishTask finish;
    finish.dtype = DType::fp32;
    finish.batch = 1;
    finish.rows = shape_.seq;
    finish.heads = shape_.heads;
    finish.head_dim = shape_.head_dim;
    finish.partial[0] = partial();
    finish.out = out_.get();
    finish.lse = lse_.get<float>();
    must(cudaMemset(out_.get(), 0xff, as_size(out_.bytes())), "poison");
    gpu::finish(finish, stream);
    must(cudaStreamSynchronize(stream), "finish");

    std::mt19937 engine(kSeed);
    std::vector<double> exact;
    std::vector<float> got(as_size(shape_.head_dim));
    double squares = 0.0;
    double errors = 0.0;
    std::int64_t count = 0;
    Errors result;
    for (int i = 0; i < samples; ++i) {
      const std::int64_t row = i == 0   ? 0
                               : i == 1 ? shape_.seq - 1
                                        : static_cast<std::int64_t>(engine() % static_cast<std::uint64_t>(shape_.seq));
      const std::int64_t head =
          i < 2 ? i * (shape_.heads - 1) : static_cast<std::int64_t>(engine() % static_cast<std::uint64_t>(shape_.heads));
      double lse = 0.0;
      const bool seen = exact_row(shape_, *noise_, offsets_, row, head, exact, lse);
      must(
          cudaMemcpy(got.data(), out_.get<float>() + (row * shape_.heads + head) * shape_.head_dim, got.size() * 4, cudaMemcpyDeviceToHost),
          "row");
      float got_lse = 0.0F;
      must(cudaMemcpy(&got_lse, lse_.get<float>() + head * shape_.seq + row, 4, cudaMemcpyDeviceToHost), "lse");
      if (seen) {
        const double difference = std::abs(static_cast<double>(got_lse) - lse);
        result.lse = std::isnan(difference) ? kInfinity : std::max(result.lse, difference);
      } else if (got_lse != -std::numeric_limits<float>::infinity()) {
        result.lse = kInfinity;
      }
      for (std::size_t e = 0; e < got.size(); ++e) {
        const double difference = static_cast<double>(got[e]) - exact[e];
        errors += difference * difference;
        squares += exact[e] * exact[e];
        ++count;
      }
    }
    result.rms = std::sqrt(errors / static_cast<double>(count)) / std::max(std::sqrt(squares / static_cast<double>(count)), 0.1);
    if (std::isnan(result.rms)) { result.rms = kInfinity; }
    return result;
  }

 private:
  Shape shape_;
  const Noise* noise_;
  std::array<std::int64_t, 3> offsets_;
  DeviceMemory q_;
  DeviceMemory k_;
  DeviceMemory v_;
  DeviceMemory acc_;
  DeviceMemory max_;
  DeviceMemory sum_;
  DeviceMemory out_;
  DeviceMemory lse_;
};

/// The attention under test with room for any tiling.
class Runner {
 public:
  // A stream that waits for the default one, on which cudaMemcpy and cudaMemset go on after they have returned.
  Runner() : workspace_(std::int64_t{2} << 30) { must(cudaStreamCreateWithFlags(&stream_, cudaStreamDefault), "stream"); }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  ~Runner() { static_cast<void>(cudaStreamDestroy(stream_)); }
  cudaStream_t stream() const { return stream_; }
  bool has_room_for(const gpu::CublasTiling& tiling) const { return gpu::CublasAttention::workspace_bytes(tiling) <= workspace_.bytes(); }
  void attend(const std::vector<AttendTask>& tasks, const gpu::CublasTiling& tiling) { attend(tasks, tiling, attention_); }
  void attend(const std::vector<AttendTask>& tasks, const gpu::CublasTiling& tiling, gpu::CublasAttention& attention) {
    attention.attend(tasks, tiling, workspace_.get(), workspace_.bytes(), stream_);
  }
  double rate(const Problem& problem, const gpu::CublasTiling& tiling, int repetitions) {
    const std::vector<AttendTask> tasks = problem.tasks();
    gpu::CublasAttention attention;  // of its own: graphs of other tilings leave less room for this one's
    const double ms = median_ms(stream_, repetitions, [&] { problem.reset(stream_); }, [&] { attend(tasks, tiling, attention); });
    return problem.shape().flops() / ms / 1e9;
  }

 private:
  cudaStream_t stream_ = nullptr;
  DeviceMemory workspace_;
  gpu::CublasAttention attention_;
};

/// RMS error of probabilities rounded to the dtype, with room for the rest of the arithmetic.
double allowed_rms(DType dtype) { return dtype == DType::fp32 ? 2e-6 : dtype == DType::fp16 ? 5e-4 : 4e-3; }
constexpr double kAllowedLse = 2e-5;

void check_attention(Runner& runner) {
  const gpu::CublasTiling small{3, 192, 96, 64, 128};
  const gpu::CublasTiling tiny{2, 64, 16, 16, 100};
  const std::vector<Shape> shapes = {
      {DType::bf16, 300, 3, 3, 64, Mask::none, {{300, 1}}},
      {DType::bf16, 300, 3, 3, 64, Mask::causal, {{300, 1}}},
      {DType::bf16, 1024, 8, 8, 128, Mask::none, {{256, 1}, {512, 2}, {1024, 4}}},
      {DType::bf16, 1024, 8, 8, 128, Mask::causal, {{256, 1}, {512, 2}, {1024, 4}}},
      {DType::bf16, 96, 16, 4, 256, Mask::causal, {{12, 3}}},
      {DType::bf16, 640, 4, 1, 40, Mask::none, {{64, 1}}},
      {DType::bf16, 257, 4, 2, 33, Mask::causal, {{257, 1}}},
      {DType::bf16, 4500, 1, 1, 72, Mask::none, {{4500, 1}}},
      {DType::fp16, 520, 6, 2, 80, Mask::causal, {{520, 1}, {40, 4}}},
      {DType::fp16, 33, 2, 1, 1, Mask::none, {{33, 1}}},
      {DType::fp16, 1, 1, 1, 64, Mask::none, {{1, 1}}},
      {DType::fp32, 700, 4, 2, 64, Mask::none, {{700, 1}, {70, 2}}},
      {DType::fp32, 700, 4, 4, 3, Mask::causal, {{700, 1}}},
      {DType::fp32, 2048, 2, 2, 256, Mask::causal, {{2048, 1}}},
  };
  for (const Shape& shape : shapes) {
    const Noise noise(shape.dtype, 4194301);
    const Problem problem(shape, noise);
    for (const gpu::CublasTiling& tiling : {gpu::default_tiling(shape.head_dim, shape.dtype, shape.mask), small, tiny}) {
      problem.reset(runner.stream());
      runner.attend(problem.tasks(), tiling);
      const Errors errors = problem.errors(runner.stream(), 40);
      char what[200];
      std::snprintf(what, sizeof what, "attention %s seq %lld heads %lld/%lld d %lld %s, %zu branches, k_tile %lld: rms %.2e lse %.2e",
                    name_of(shape.dtype), static_cast<long long>(shape.seq), static_cast<long long>(shape.heads),
                    static_cast<long long>(shape.kv_heads), static_cast<long long>(shape.head_dim),
                    shape.mask == Mask::causal ? "causal" : "full", shape.branches.size(), static_cast<long long>(tiling.k_tile),
                    errors.rms, errors.lse);
      expect(errors.rms <= allowed_rms(shape.dtype) && errors.lse <= kAllowedLse, what);
    }
  }
}

/// Lists that take turns, through graphs and without: the same bits, and graphs from each list's second call on.
void check_graphs(Runner& runner) {
  const std::vector<Shape> shapes = {
      {DType::bf16, 2048, 8, 8, 128, Mask::none, {{512, 1}, {1024, 2}, {2048, 4}}},
      {DType::bf16, 2048, 8, 4, 64, Mask::causal, {{2048, 1}, {1024, 4}}},
      {DType::fp16, 1024, 16, 4, 256, Mask::causal, {{64, 4}}},
      {DType::fp32, 640, 4, 1, 40, Mask::none, {{64, 1}}},
  };
  constexpr int kRounds = 5;
  std::vector<Noise> noises;
  std::vector<Problem> problems;
  noises.reserve(shapes.size());
  for (const Shape& shape : shapes) {
    noises.emplace_back(shape.dtype, 4194301);
    problems.emplace_back(shape, noises.back());
  }
  gpu::CublasAttention eager(gpu::Submission::eager);
  gpu::CublasAttention graphs(gpu::Submission::graph);
  std::int64_t lists = 0;
  std::int64_t differing = 0;
  const std::array<gpu::CublasTiling, 2> narrow{{{3, 192, 96, 64, 128}, {2, 64, 16, 16, 100}}};
  for (std::size_t t = 0; t <= narrow.size(); ++t) {
    for (int round = 0; round < kRounds; ++round) {
      for (const Problem& problem : problems) {
        const Shape& shape = problem.shape();
        const gpu::CublasTiling tiling = t < narrow.size() ? narrow[t] : gpu::default_tiling(shape.head_dim, shape.dtype, shape.mask);
        const auto bits_of = [&](gpu::CublasAttention& attention) {
          problem.reset(runner.stream());
          runner.attend(problem.tasks(), tiling, attention);
          must(cudaStreamSynchronize(runner.stream()), "attend");
          return problem.partial_bytes();
        };
        if (bits_of(eager) != bits_of(graphs)) { ++differing; }
        if (round == 0) { ++lists; }
      }
    }
  }
  std::printf("graphs: %lld lists of tasks, %lld graph launches, %lld results that differ from eager ones\n", static_cast<long long>(lists),
              static_cast<long long>(graphs.graph_launches()), static_cast<long long>(differing));
  expect(differing == 0, "graphs change the result");
  expect(graphs.graph_launches() == (kRounds - 1) * lists, "some lists of tasks were not launched as graphs");
  expect(eager.graph_launches() == 0, "eager attention launched a graph");
}

/// Error of keys attended in `steps` parts, one after the other, as a ring does.
void check_ring_steps(Runner& runner) {
  for (const DType dtype : {DType::bf16, DType::fp32}) {
    const Shape shape{dtype, 4096, 4, 4, 64, Mask::none, {{4096, 1}}};
    const Noise noise(dtype, 4194301);
    const Problem problem(shape, noise);
    double single = 0.0;
    for (const std::int64_t steps : {1, 8, 16}) {
      problem.reset(runner.stream());
      for (std::int64_t step = 0; step < steps; ++step) {
        std::vector<AttendTask> tasks = problem.tasks();
        AttendTask& task = tasks.front();
        task.k_rows /= steps;
        const std::int64_t skip = step * task.k_rows * task.kv_strides.row * size_of(dtype);
        task.k = static_cast<const std::byte*>(task.k) + skip;
        task.v = static_cast<const std::byte*>(task.v) + skip;
        runner.attend(tasks, gpu::default_tiling(shape.head_dim, dtype, shape.mask));
      }
      const Errors errors = problem.errors(runner.stream(), 200);
      if (steps == 1) { single = errors.rms; }
      std::printf("ring %s, %2lld steps: rms error %.3e (%.3f of one pass), lse %.1e\n", name_of(dtype), static_cast<long long>(steps),
                  errors.rms, errors.rms / single, errors.lse);
      expect(errors.rms <= 1.05 * single + (dtype == DType::fp32 ? 2e-7 : 0.0), "ring error grows with the steps");
    }
  }
}

// --- the other kernels -------------------------------------------------------------------------------------------------------------------

/// A random partial, some rows of it empty.
struct HostPartial {
  HostPartial(std::int64_t rows, std::int64_t head_dim, std::uint32_t seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    acc.resize(as_size(rows * head_dim));
    for (float& value : acc) { value = normal(engine); }
    for (std::int64_t row = 0; row < rows; ++row) {
      const bool empty = engine() % 3 == 0;
      max.push_back(empty ? -std::numeric_limits<float>::infinity() : 4.0F * normal(engine));
      sum.push_back(empty ? 0.0F : 1.0F + std::abs(normal(engine)));
    }
  }
  std::vector<float> acc;
  std::vector<float> max;
  std::vector<float> sum;
};

struct DevicePartial {
  explicit DevicePartial(const HostPartial& from) : acc(from.acc), max(from.max), sum(from.sum) {}
  kernels::PartialPointers pointers() const { return {acc.get(), max.get(), sum.get()}; }
  DeviceMemory acc;
  DeviceMemory max;
  DeviceMemory sum;
};

bool close(float got, double expected, double relative) {
  if (std::isinf(expected)) { return static_cast<double>(got) == expected; }
  return std::abs(static_cast<double>(got) - expected) <= relative * std::max(1.0, std::abs(expected));
}

/// Clears acc where the row is empty, as the contract has it.
void clear_empty_rows(HostPartial& partial, std::int64_t batch, std::int64_t rows, std::int64_t heads, std::int64_t d) {
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t row = 0; row < rows; ++row) {
        if (partial.sum[as_size((b * heads + h) * rows + row)] != 0.0F) { continue; }
        for (std::int64_t i = 0; i < d; ++i) { partial.acc[as_size(((b * rows + row) * heads + h) * d + i)] = 0.0F; }
      }
    }
  }
}

void check_partials(cudaStream_t stream) {
  std::mt19937 engine(kSeed);
  for (const std::int64_t d : {1, 3, 8, 20, 64, 65, 128, 256}) {
    const std::int64_t batch = 2;
    const std::int64_t rows = 37;
    const std::int64_t heads = 5;
    const std::int64_t all = batch * rows * heads;
    std::vector<HostPartial> host;
    for (int g = 0; g < 3; ++g) {
      host.emplace_back(all, d, static_cast<std::uint32_t>(engine()));
      clear_empty_rows(host.back(), batch, rows, heads, d);
    }
    std::vector<DevicePartial> device;
    for (const HostPartial& partial : host) { device.emplace_back(partial); }

    for (const DType dtype : {DType::fp32, DType::fp16, DType::bf16}) {
      for (const kernels::Combine combine : {kernels::Combine::lse, kernels::Combine::mean, kernels::Combine::sum}) {
        for (const int partials : {1, 3}) {
          DeviceMemory out(all * d * size_of(dtype));
          DeviceMemory lse(all * 4);
          kernels::FinishTask task;
          task.dtype = dtype;
          task.combine = combine;
          task.batch = batch;
          task.rows = rows;
          task.heads = heads;
          task.head_dim = d;
          task.output_scale = 0.75;
          task.partials = partials;
          for (int g = 0; g < partials; ++g) { task.partial[g] = device[as_size(g)].pointers(); }
          task.out = out.get();
          task.lse = lse.get<float>();
          gpu::finish(task, stream);
          must(cudaStreamSynchronize(stream), "finish");
          const std::vector<float> got_lse = lse.host<float>();
          const std::vector<std::byte> bytes = out.host<std::byte>();
          bool right = true;
          for (std::int64_t b = 0; b < batch; ++b) {
            for (std::int64_t h = 0; h < heads; ++h) {
              for (std::int64_t row = 0; row < rows; ++row) {
                const std::size_t stat = as_size((b * heads + h) * rows + row);
                double max = -kInfinity;
                double covering = 0.0;
                for (int g = 0; g < partials; ++g) {
                  max = std::max(max, static_cast<double>(host[as_size(g)].max[stat]));
                  covering += host[as_size(g)].sum[stat] != 0.0F ? 1.0 : 0.0;
                }
                double total = 0.0;
                for (int g = 0; g < partials && covering > 0; ++g) {
                  total +=
                      static_cast<double>(host[as_size(g)].sum[stat]) * std::exp(static_cast<double>(host[as_size(g)].max[stat]) - max);
                }
                right = right && close(got_lse[stat], covering > 0 ? max + std::log(total) : -kInfinity, 1e-6);
                for (std::int64_t i = 0; i < d; ++i) {
                  const std::size_t at = as_size(((b * rows + row) * heads + h) * d + i);
                  double value = 0.0;
                  for (int g = 0; g < partials; ++g) {
                    const HostPartial& part = host[as_size(g)];
                    if (part.sum[stat] == 0.0F) { continue; }
                    const double weight = combine == kernels::Combine::lse ? std::exp(static_cast<double>(part.max[stat]) - max) / total
                                                                           : 1.0 / static_cast<double>(part.sum[stat]);
                    value += weight * static_cast<double>(part.acc[at]);
                  }
                  if (combine == kernels::Combine::mean && covering > 0) { value /= covering; }
                  const float got = kernels::with_element(dtype, [&](auto tag) {
                    decltype(tag) element{};
                    std::memcpy(&element, bytes.data() + at * sizeof element, sizeof element);
                    return kernels::to_float(element);
                  });
                  right = right && close(got, 0.75 * value, dtype == DType::fp32 ? 2e-6 : dtype == DType::fp16 ? 6e-4 : 4e-3);
                }
              }
            }
          }
          expect(right,
                 "finish " + std::string(name_of(dtype)) + " head_dim " + std::to_string(d) + ", partials " + std::to_string(partials));
        }
      }
    }

    gpu::fill_identity(device[2].pointers(), all, d, stream);
    must(cudaStreamSynchronize(stream), "fill");
    const auto all_are = [](const std::vector<float>& values, float value) {
      return std::all_of(values.begin(), values.end(), [&](float x) { return x == value; });
    };
    expect(all_are(device[2].acc.host<float>(), 0.0F) && all_are(device[2].sum.host<float>(), 0.0F) &&
               all_are(device[2].max.host<float>(), -std::numeric_limits<float>::infinity()),
           "fill_identity head_dim " + std::to_string(d));
  }
}

void check_pack(cudaStream_t stream) {
  for (const std::int64_t element_size : {2, 4}) {
    for (const std::int64_t d : {1, 3, 8, 64, 72}) {
      for (const std::int64_t head_step : {1, 3}) {
        const std::int64_t batch = 2;
        const std::int64_t rows = 29;
        const std::int64_t heads = 3;
        const std::int64_t pitch = 9 * d;
        const std::int64_t rate = 4;
        std::vector<std::byte> source(as_size(batch * rows * rate * pitch * element_size));
        std::mt19937 engine(kSeed);
        for (std::byte& byte : source) { byte = static_cast<std::byte>(engine()); }
        const DeviceMemory src(source);
        const DeviceMemory dst(batch * rows * heads * d * element_size);
        kernels::PackTask task{element_size, batch, rows, heads, d, src.get(), dst.get(), rows * rate * pitch, rate * pitch, head_step * d};
        gpu::pack({&task, 1}, stream);
        must(cudaStreamSynchronize(stream), "pack");
        std::vector<std::byte> expected;
        for (std::int64_t b = 0; b < batch; ++b) {
          for (std::int64_t row = 0; row < rows; ++row) {
            for (std::int64_t h = 0; h < heads; ++h) {
              const std::int64_t from = (b * task.src_batch_stride + row * task.src_row_stride + h * task.src_head_stride) * element_size;
              expected.insert(expected.end(), source.begin() + from, source.begin() + from + d * element_size);
            }
          }
        }
        expect(dst.host<std::byte>() == expected, "pack head_dim " + std::to_string(d) + " of " + std::to_string(element_size) + " bytes");
      }
    }
  }
}

void print_copies(cudaStream_t stream) {
  constexpr std::int64_t kRows = 65536;
  constexpr std::int64_t kHeads = 16;
  constexpr std::int64_t kDim = 128;
  constexpr std::int64_t kAll = kRows * kHeads;
  constexpr int kRepetitions = 30;
  const DeviceMemory big(kAll * kDim * 4);
  const DeviceMemory other(kAll * kDim * 4);
  const DeviceMemory stats(4 * kAll * 4);
  const DeviceMemory out(kAll * kDim * 2);
  const DeviceMemory lse(kAll * 4);
  float* stat = stats.get<float>();
  const kernels::PartialPointers a{big.get(), stat, stat + kAll};
  const kernels::PartialPointers b{other.get(), stat + 2 * kAll, stat + 3 * kAll};
  const auto nothing = [] {};
  const double stat_bytes = 8.0 * static_cast<double>(kAll);
  const double acc_bytes = 4.0 * static_cast<double>(kAll * kDim);

  const double copy_ms = median_ms(stream, kRepetitions, nothing, [&] {
    must(cudaMemcpyAsync(other.get(), big.get(), as_size(big.bytes()), cudaMemcpyDeviceToDevice, stream), "copy");
  });
  const double copy_gbs = 2 * acc_bytes / copy_ms / 1e6;
  std::printf("device copy of %lld MiB: %.0f GB/s (read + written)\n", static_cast<long long>(big.bytes() >> 20), copy_gbs);
  const auto print = [&](const char* what, double bytes, double ms) {
    std::printf("%-28s %8.3f ms %7.0f GB/s  %.2f of copy\n", what, ms, bytes / ms / 1e6, bytes / ms / 1e6 / copy_gbs);
  };

  print("fill_identity", acc_bytes + stat_bytes,
        median_ms(stream, kRepetitions, nothing, [&] { gpu::fill_identity(a, kAll, kDim, stream); }));

  // Partials with every row covered: max 0, sum 1, acc noise.
  const Noise noise(DType::fp32, 4194301);
  std::vector<float> filled(as_size(kAll), 0.0F);
  must(cudaMemcpy(stat, filled.data(), filled.size() * 4, cudaMemcpyHostToDevice), "stats");
  must(cudaMemcpy(stat + 2 * kAll, filled.data(), filled.size() * 4, cudaMemcpyHostToDevice), "stats");
  std::fill(filled.begin(), filled.end(), 1.0F);
  must(cudaMemcpy(stat + kAll, filled.data(), filled.size() * 4, cudaMemcpyHostToDevice), "stats");
  must(cudaMemcpy(stat + 3 * kAll, filled.data(), filled.size() * 4, cudaMemcpyHostToDevice), "stats");
  {
    const DeviceMemory random = repeated(noise, DType::fp32, kAll * kDim, 17);
    must(cudaMemcpy(big.get(), random.get(), as_size(big.bytes()), cudaMemcpyDeviceToDevice), "acc");
    must(cudaMemcpy(other.get(), random.get(), as_size(big.bytes()), cudaMemcpyDeviceToDevice), "acc");
  }

  kernels::FinishTask finish;
  finish.dtype = DType::bf16;
  finish.batch = 1;
  finish.rows = kRows;
  finish.heads = kHeads;
  finish.head_dim = kDim;
  finish.partial[0] = a;
  finish.partial[1] = b;
  finish.out = out.get();
  finish.lse = lse.get<float>();
  print("finish, 1 partial, bf16", 1.5 * acc_bytes + 1.5 * stat_bytes,
        median_ms(stream, kRepetitions, nothing, [&] { gpu::finish(finish, stream); }));
  finish.partials = 2;
  finish.combine = kernels::Combine::mean;
  print("finish, 2 partials, bf16", 2.5 * acc_bytes + 2.5 * stat_bytes,
        median_ms(stream, kRepetitions, nothing, [&] { gpu::finish(finish, stream); }));

  // Rows [seq, 16, 128] of bf16 in 512 MiB: every r-th row of all heads, then the heads of each offset apart.
  constexpr std::int64_t kSeq = 131072;
  for (const std::int64_t rate : {2, 8}) {
    const double bytes = 2.0 * static_cast<double>(kSeq / rate * kHeads * kDim * 2);
    const kernels::PackTask whole{2, 1, kSeq / rate, kHeads, kDim, big.get(), other.get(), 0, rate * kHeads * kDim, kDim};
    print(rate == 2 ? "pack r = 2, all heads" : "pack r = 8, all heads", bytes,
          median_ms(stream, kRepetitions, nothing, [&] { gpu::pack({&whole, 1}, stream); }));
    std::vector<kernels::PackTask> parts;
    for (std::int64_t o = 0; o < rate; ++o) {
      kernels::PackTask& part = parts.emplace_back(whole);
      part.heads = kHeads / rate;
      part.src = big.get() + (o * kHeads + o) * kDim * 2;
      part.dst = other.get() + o * (kSeq / rate) * part.heads * kDim * 2;
      part.src_head_stride = rate * kDim;
    }
    print(rate == 2 ? "pack r = 2, head mod r" : "pack r = 8, head mod r", bytes,
          median_ms(stream, kRepetitions, nothing, [&] { gpu::pack(parts, stream); }));
  }
}

std::string text_of(const gpu::CublasTiling& tiling) {
  char text[120];
  std::snprintf(text, sizeof text, "{%lld, %lld, %lld, %lld, %lld}", static_cast<long long>(tiling.streams),
                static_cast<long long>(tiling.rows), static_cast<long long>(tiling.q_tile), static_cast<long long>(tiling.causal_q_tile),
                static_cast<long long>(tiling.k_tile));
  return text;
}

double print_rate(Runner& runner, const Noise& noise, const char* what, const Shape& shape) {
  const Problem problem(shape, noise);
  const gpu::CublasTiling tiling = gpu::default_tiling(shape.head_dim, shape.dtype, shape.mask);
  problem.reset(runner.stream());
  runner.attend(problem.tasks(), tiling);
  const Errors errors = problem.errors(runner.stream(), 24);
  expect(errors.rms <= allowed_rms(shape.dtype) && errors.lse <= kAllowedLse, what);
  const double rate = runner.rate(problem, tiling, 20);
  std::printf("%-40s d %3lld %s  %7.1f TFLOP/s   rms %.2e  lse %.1e\n", what, static_cast<long long>(shape.head_dim), name_of(shape.dtype),
              rate, errors.rms, errors.lse);
  return rate;
}

void print_attention(Runner& runner) {
  const std::vector<std::array<std::int64_t, 2>> longnet = {{2048, 1}, {4096, 2}, {8192, 4}, {16384, 8}};
  const Noise noise(DType::bf16, 4194301);
  for (const std::int64_t d : {64, 128, 256}) {
    const std::int64_t heads = 2048 / d;
    const double dense = print_rate(runner, noise, "dense 8192", {DType::bf16, 8192, heads, heads, d, Mask::none, {{8192, 1}}});
    const double causal = print_rate(runner, noise, "causal 8192", {DType::bf16, 8192, heads, heads, d, Mask::causal, {{8192, 1}}});
    std::printf("    causal / dense %.2f\n", causal / dense);
    // The pattern has 1 + 1/2 + 1/4 + 1/8 as many (segment, head) pairs of 2048 rows as one pass of its first branch.
    const double segment =
        print_rate(runner, noise, "w 2048, r 1 at 65536", {DType::bf16, 65536, heads, heads, d, Mask::none, {{2048, 1}}});
    const double pattern = print_rate(runner, noise, "LongNet at 65536", {DType::bf16, 65536, heads, heads, d, Mask::none, longnet});
    const double masked =
        print_rate(runner, noise, "LongNet causal at 65536", {DType::bf16, 65536, heads, heads, d, Mask::causal, longnet});
    std::printf("    LongNet / (w 2048, r 1) %.2f, causal LongNet / LongNet %.2f\n", pattern / segment, masked / pattern);
  }
  print_rate(runner, noise, "dense 8192, 4 query heads per KV head", {DType::bf16, 8192, 16, 4, 128, Mask::none, {{8192, 1}}});
  print_rate(runner, noise, "dense 32768", {DType::bf16, 32768, 8, 8, 128, Mask::none, {{32768, 1}}});
  const Noise half(DType::fp16, 4194301);
  print_rate(runner, half, "dense 8192", {DType::fp16, 8192, 16, 16, 128, Mask::none, {{8192, 1}}});
  const Noise single(DType::fp32, 4194301);
  print_rate(runner, single, "dense 4096", {DType::fp32, 4096, 16, 16, 128, Mask::none, {{4096, 1}}});
}

void sweep(Runner& runner) {
  struct Timed {
    double rate;
    gpu::CublasTiling tiling;
  };
  const Noise noise(DType::bf16, 4194301);
  for (const Mask mask : {Mask::none, Mask::causal}) {
    for (const std::int64_t d : {64, 128, 256}) {
      const std::int64_t heads = 2048 / d;
      const Problem problem({DType::bf16, 8192, heads, heads, d, mask, {{8192, 1}}}, noise);
      std::vector<Timed> timed;
      for (const std::int64_t streams : {1, 2, 3, 4}) {
        for (const std::int64_t rows : {1024, 2048, 4096, 8192}) {
          for (const std::int64_t q_tile : {256, 512, 1024, 2048, 4096}) {
            for (const std::int64_t k_tile : {512, 1024, 2048, 4096}) {
              const std::int64_t in_flight = streams * rows * k_tile * 4;
              const bool unlikely = q_tile > rows || rows > 16 * q_tile || (mask == Mask::causal ? q_tile > 1024 : q_tile < 512);
              const gpu::CublasTiling tiling{streams, rows, q_tile, q_tile, k_tile};
              if (unlikely || in_flight < (8 << 20) || in_flight > (64 << 20) || !runner.has_room_for(tiling)) { continue; }
              timed.push_back({runner.rate(problem, tiling, 3), tiling});
            }
          }
        }
      }
      std::sort(timed.begin(), timed.end(), [](const Timed& a, const Timed& b) { return a.rate > b.rate; });
      std::printf("sweep d %lld %s, %zu tilings {streams, rows, q_tile, causal_q_tile, k_tile}\n", static_cast<long long>(d),
                  mask == Mask::causal ? "causal" : "dense", timed.size());
      for (std::size_t i = 0; i < std::min<std::size_t>(timed.size(), 10); ++i) {
        const gpu::CublasTiling& t = timed[i].tiling;
        std::printf("  %6.1f TFLOP/s %s, %lld MiB of scores in flight\n", runner.rate(problem, t, 20), text_of(t).c_str(),
                    static_cast<long long>(t.streams * t.rows * t.k_tile * 4 >> 20));
      }
    }
  }
}

int run(int argc, char** argv) {
  bool check_only = false;
  bool with_sweep = false;
  int device = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    if (option == "--check-only") {
      check_only = true;
    } else if (option == "--sweep") {
      with_sweep = true;
    } else if (option == "--device" && i + 1 < argc) {
      device = std::atoi(argv[++i]);
    } else {
      std::fprintf(stderr, "usage: annulus_cuda_rates [--check-only] [--sweep] [--device N]\n");
      return 2;
    }
  }
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  must(cudaSetDevice(device), "cudaSetDevice");
  cudaDeviceProp properties{};
  must(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::printf("%s, %d multiprocessors, L2 %d MiB\n", properties.name, properties.multiProcessorCount, properties.l2CacheSize >> 20);
  if (!gpu::built_for_current_device()) { throw std::runtime_error("this binary holds no machine code for this GPU"); }

  Runner runner;
  check_pack(runner.stream());
  check_partials(runner.stream());
  check_attention(runner);
  check_graphs(runner);
  check_ring_steps(runner);
  std::printf("checks: %d failed\n", failures);
  if (failures != 0 || check_only) { return failures != 0 ? 1 : 0; }

  print_copies(runner.stream());
  print_attention(runner);
  if (with_sweep) { sweep(runner); }
  std::printf("checks: %d failed\n", failures);
  return failures != 0 ? 1 : 0;
}

}  // namespace
}  // namespace annulus

int main(int argc, char** argv) {
  try {
    return annulus::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "annulus_cuda_rates: %s\n", error.what());
    return 3;
  }
}
