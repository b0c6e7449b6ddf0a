// SPDX-License-Identifier: Apache-2.0
// The kernels of the backward pass: reference against cases worked out by hand, cpu against reference, and how cublas cuts it, with its
// products done by plain loops and, where there is a GPU, as it is.
#include <annulus/kernels/cpu.hpp>
#include <annulus/kernels/reference.hpp>
#include <annulus/kernels/visible_keys.hpp>
#include <annulus_test.hpp>

#include "cublas/gradient_tiles.hpp"
#if ANNULUS_TEST_ON_GPU
#include "device_memory.hpp"
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

using namespace annulus;
using namespace annulus::kernels;

namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

/// Workspace as the kernels want it.
struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
std::unique_ptr<void, Free> workspace(std::int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, size((bytes + 63) / 64 * 64)));
}

template <class Element>
double element_of(const void* matrix, std::int64_t index) {
  return static_cast<double>(to_float(static_cast<const Element*>(matrix)[index]));
}

/// The product as the library does it, column-major.
void multiply(DType dtype, const cuda::GradientProduct& product) {
  with_element(dtype, [&](auto tag) {
    using Element = decltype(tag);
    for (std::int64_t batch = 0; batch < product.batches; ++batch) {
      for (std::int64_t n = 0; n < product.n; ++n) {
        for (std::int64_t m = 0; m < product.m; ++m) {
          double sum = 0;
          for (std::int64_t k = 0; k < product.k; ++k) {
            const std::int64_t a = product.a_transposed ? m * product.lda + k : k * product.lda + m;
            const std::int64_t b = product.b_transposed ? k * product.ldb + n : n * product.ldb + k;
            sum +=
                element_of<Element>(product.a, batch * product.stride_a + a) * element_of<Element>(product.b, batch * product.stride_b + b);
          }
          float& c = product.c[batch * product.stride_c + n * product.ldc + m];
          const double before = product.beta == 0.0F ? 0.0 : static_cast<double>(product.beta * c);
          c = static_cast<float>(before + static_cast<double>(product.alpha) * sum);
        }
      }
    }
  });
}

/// What the device does between the products.
void differentiate_scores(const GradientTask& task, const cuda::GradientTile& tile, const cuda::GradientScratch& scratch) {
  const AttendTask& at = task.attend;
  with_element(at.dtype, [&](auto tag) {
    using Element = decltype(tag);
    for (std::int64_t i = 0; i < tile.instances; ++i) {
      for (std::int64_t row = 0; row < tile.rows; ++row) {
        const std::int64_t stat = tile.base.stat + i * tile.step.stat + (tile.q_begin + row) * at.stat_strides.row;
        const double max = static_cast<double>(static_cast<const float*>(at.max)[stat]);
        const double sum = static_cast<double>(static_cast<const float*>(at.sum)[stat]);
        float* scores = scratch.scores + i * scratch.instance_stride + row * scratch.ld;
        float* products = scratch.products + i * scratch.instance_stride + row * scratch.ld;
        for (std::int64_t col = 0; col < tile.cols; ++col) {
          const bool visible = tile.k_begin + col < visible_keys(at, tile.q_begin + row);
          CHECK((visible || tile.masked));
          const double p = visible ? std::exp(static_cast<double>(scores[col]) - max) : 0.0;
          const double ds = at.scale * p * (static_cast<double>(products[col]) - sum);
          reinterpret_cast<Element*>(scores)[col] = from_float<Element>(static_cast<float>(p));
          reinterpret_cast<Element*>(products)[col] = from_float<Element>(static_cast<float>(ds));
        }
      }
    }
  });
}

struct Shape {
  DType dtype = DType::fp32;
  Mask mask = Mask::none;
  std::int64_t batch = 1;
  std::int64_t segments = 1;
  std::int64_t q_rows = 1;
  std::int64_t k_rows = 1;
  std::int64_t kv_heads = 1;
  std::int64_t q_per_kv = 1;
  std::int64_t head_dim = 1;
  Positions q_positions;
  Positions k_positions;
};

/// Operands of a task with rows in the order [batch, segment, row, kv_head, head, head_dim], and results in two precisions.
class Problem {
 public:
  Problem(const Shape& shape, unsigned seed) : shape_(shape) {
    std::mt19937 random(seed);
    const std::int64_t rows = shape.batch * shape.segments * shape.q_rows * shape.kv_heads * shape.q_per_kv;
    fill(q_, rows * shape.head_dim, random);
    fill(dout_, rows * shape.head_dim, random);
    const std::int64_t keys = shape.batch * shape.segments * shape.k_rows * shape.kv_heads * shape.head_dim;
    fill(k_, keys, random);
    fill(v_, keys, random);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < rows; ++i) {
      // About the LSE of so many keys, so that probabilities sum to about 1.
      max_.push_back(std::log(static_cast<float>(shape.k_rows)) + 0.25F * normal(random));
      sum_.push_back(0.1F * normal(random));
    }
    max_.front() = std::numeric_limits<float>::infinity();  // a row that sees nothing
  }

  struct Result {
    std::vector<double> dq;
    std::vector<float> dk;
    std::vector<float> dv;
  };

  Result reference() const {
    Result result = start();
    std::vector<double> max(max_.begin(), max_.end());
    std::vector<double> sum(sum_.begin(), sum_.end());
    GradientTask task = task_of(result.dk, result.dv);
    task.attend.acc = result.dq.data();
    task.attend.max = max.data();
    task.attend.sum = sum.data();
    kernels::reference::differentiate(task);
    return result;
  }

  Result cpu(int threads) const {
    const cpu::Settings settings{threads, 0, nullptr};
    const auto memory = workspace(cpu::gradient_workspace_bytes(shape_.head_dim, settings));
    return in_fp32([&](const GradientTask& task) { kernels::cpu::differentiate(task, settings, memory.get()); });
  }

  /// By the tiles and products of kernel cublas; P and dS made at once, or written over two products.
  Result by_products(const cuda::CublasTiling& tiling, bool at_once) const {
    std::vector<std::byte> memory(size(cuda::gradient_scratch_bytes(tiling)));
    std::vector<float> floats;
    return in_fp32([&](const GradientTask& task) {
      cuda::for_each_gradient_tile(task.attend, at_once ? tiling : cuda::tiling_of_floats(tiling), [&](const cuda::GradientTile& tile) {
        const auto make = [&](const cuda::GradientScratch& scratch) {
          for (const cuda::GradientProduct& product : cuda::score_products(task, tile, scratch)) { multiply(shape_.dtype, product); }
          differentiate_scores(task, tile, scratch);
        };
        cuda::GradientScratch scratch = cuda::scratch_of_floats(tiling, tile, memory.data());
        if (at_once) {
          // As if by the kernel that makes them at once: elsewhere, and then their 16 bits alone.
          const std::int64_t numbers = tile.instances * scratch.instance_stride;
          floats.resize(size(2 * numbers));
          const cuda::GradientScratch aside{floats.data(), floats.data() + numbers, scratch.ld, scratch.instance_stride};
          make(aside);
          scratch = cuda::scratch_of_elements(tiling, tile, memory.data());
          for (std::int64_t row = 0; row < tile.instances * tile.rows; ++row) {
            for (const auto& [to, from] : {std::pair{scratch.scores, aside.scores}, {scratch.products, aside.products}}) {
              std::memcpy(to + row * scratch.ld, from + row * aside.ld, size(scratch.ld) * sizeof(float));
            }
          }
        } else {
          make(scratch);
        }
        for (const cuda::GradientProduct& product : cuda::gradient_products(task, tile, scratch)) { multiply(shape_.dtype, product); }
      });
    });
  }

  /// What `use` makes of the task.
  template <class Use>
  auto with_task(const Use& use) const {
    Result result = start();
    return use(task_of(result.dk, result.dv));
  }

#if ANNULUS_TEST_ON_GPU
  Result by_cublas(const cuda::CublasTiling& tiling) const {
    cuda::CublasGradients kernel;
    const DeviceMemory memory(cuda::CublasGradients::workspace_bytes(tiling));
    Result result = start();
    const DeviceMemory q(q_);
    const DeviceMemory k(k_);
    const DeviceMemory v(v_);
    const DeviceMemory dout(dout_);
    const DeviceMemory max(max_);
    const DeviceMemory sum(sum_);
    const DeviceMemory dq(std::vector<float>(result.dq.begin(), result.dq.end()));
    const DeviceMemory dk(result.dk);
    const DeviceMemory dv(result.dv);
    GradientTask task = task_of(result.dk, result.dv);
    task.attend.q = q.get();
    task.attend.k = k.get();
    task.attend.v = v.get();
    task.attend.acc = dq.get();
    task.attend.max = max.get();
    task.attend.sum = sum.get();
    task.dout = dout.get();
    task.dk = dk.get<float>();
    task.dv = dv.get<float>();
    kernel.differentiate(task, tiling, memory.get(), memory.bytes(), nullptr);
    must(cudaDeviceSynchronize(), "differentiate");
    const std::vector<float> found = dq.host<float>();
    result.dq.assign(found.begin(), found.end());
    result.dk = dk.host<float>();
    result.dv = dv.host<float>();
    return result;
  }
#endif

 private:
  /// Of kernels whose dQ, max and sum are fp32.
  template <class Differentiate>
  Result in_fp32(const Differentiate& differentiate) const {
    Result result = start();
    std::vector<float> dq(result.dq.begin(), result.dq.end());
    std::vector<float> max = max_;
    std::vector<float> sum = sum_;
    GradientTask task = task_of(result.dk, result.dv);
    task.attend.acc = dq.data();
    task.attend.max = max.data();
    task.attend.sum = sum.data();
    differentiate(task);
    result.dq.assign(dq.begin(), dq.end());
    return result;
  }

  void fill(std::vector<std::byte>& bytes, std::int64_t count, std::mt19937& random) const {
    std::normal_distribution<float> normal;
    bytes.resize(size(count * size_of(shape_.dtype)));
    with_element(shape_.dtype, [&](auto tag) {
      auto* elements = reinterpret_cast<decltype(tag)*>(bytes.data());
      for (std::int64_t i = 0; i < count; ++i) { elements[i] = from_float<decltype(tag)>(normal(random)); }
    });
  }

  /// Something is there already.
  Result start() const {
    Result result;
    result.dq.assign(q_.size() / size(size_of(shape_.dtype)), 0.5);
    result.dk.assign(k_.size() / size(size_of(shape_.dtype)), -0.25F);
    result.dv.assign(result.dk.size(), 2.0F);
    return result;
  }

  GradientTask task_of(std::vector<float>& dk, std::vector<float>& dv) const {
    GradientTask task;
    AttendTask& at = task.attend;
    at.dtype = shape_.dtype;
    at.mask = shape_.mask;
    at.batch = shape_.batch;
    at.segments = shape_.segments;
    at.q_rows = shape_.q_rows;
    at.k_rows = shape_.k_rows;
    at.kv_heads = shape_.kv_heads;
    at.q_per_kv = shape_.q_per_kv;
    at.head_dim = shape_.head_dim;
    at.scale = 1.0 / std::sqrt(static_cast<double>(shape_.head_dim));
    at.q = q_.data();
    at.k = k_.data();
    at.v = v_.data();
    const std::int64_t heads = shape_.kv_heads * shape_.q_per_kv;
    at.q_strides = {shape_.segments * shape_.q_rows * heads * shape_.head_dim, shape_.q_rows * heads * shape_.head_dim,
                    heads * shape_.head_dim, shape_.q_per_kv * shape_.head_dim, shape_.head_dim};
    at.acc_strides = at.q_strides;
    at.stat_strides = {shape_.segments * shape_.q_rows * heads, shape_.q_rows * heads, heads, shape_.q_per_kv, 1};
    at.kv_strides = {shape_.segments * shape_.k_rows * shape_.kv_heads * shape_.head_dim, shape_.k_rows * shape_.kv_heads * shape_.head_dim,
                     shape_.kv_heads * shape_.head_dim, shape_.head_dim, 0};
    at.q_positions = shape_.q_positions;
    at.k_positions = shape_.k_positions;
    task.dout = dout_.data();
    task.dk = dk.data();
    task.dv = dv.data();
    return task;
  }

  Shape shape_;
  std::vector<std::byte> q_;
  std::vector<std::byte> k_;
  std::vector<std::byte> v_;
  std::vector<std::byte> dout_;
  std::vector<float> max_;
  std::vector<float> sum_;
};

template <class Number>
double largest_difference(const std::vector<Number>& a, const std::vector<Number>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(difference <= largest)) { largest = difference; }
  }
  return largest;
}

/// Of P and dS, in gradients of the order of 1.
double rounding_of(DType dtype) { return dtype == DType::fp32 ? 2e-5 : (dtype == DType::fp16 ? 4e-3 : 4e-2); }

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const DType dtype : {DType::fp32, DType::fp16, DType::bf16}) {
    all.push_back({dtype, Mask::none, 2, 3, 7, 5, 2, 3, 5, {}, {}});
    all.push_back({dtype, Mask::none, 1, 1, 150, 600, 1, 2, 40, {}, {}});
    all.push_back({dtype, Mask::causal, 1, 2, 200, 300, 2, 1, 17, {150, 1}, {0, 1}});
    all.push_back({dtype, Mask::causal, 1, 1, 130, 520, 1, 1, 8, {100, 3}, {2, 2}});
    all.push_back({dtype, Mask::causal, 1, 1, 64, 256, 1, 1, 256, {0, 1}, {300, 1}});  // sees nothing
  }
  return all;
}

}  // namespace

TEST_CASE("cpu differentiates as reference does, to fp32's rounding, and adds to what is there") {
  unsigned seed = 1;
  for (const Shape& shape : shapes()) {
    INFO("seed " << seed << ", " << shape.q_rows << " x " << shape.k_rows << " rows, head_dim " << shape.head_dim);
    const Problem problem(shape, seed++);

    const Problem::Result expected = problem.reference();
    const Problem::Result found = problem.cpu(2);

    // Gradients are of the order of 1, sums of up to 600 terms.
    CHECK(largest_difference(found.dq, expected.dq) < 2e-5);
    CHECK(largest_difference(found.dk, expected.dk) < 2e-5);
    CHECK(largest_difference(found.dv, expected.dv) < 2e-5);
  }
}

TEST_CASE("cpu differentiates to the same bits on any number of threads") {
  for (const Shape& shape : shapes()) {
    const Problem problem(shape, 99);

    const Problem::Result one = problem.cpu(1);

    for (const int threads : {2, 3, 5}) {
      const Problem::Result several = problem.cpu(threads);
      CHECK(several.dq == one.dq);
      CHECK(several.dk == one.dk);
      CHECK(several.dv == one.dv);
    }
  }
}

TEST_CASE("the tiles and products of kernel cublas differentiate as reference does, but for the rounding of P and dS") {
  for (const auto& [tiling, at_once] : {std::pair{cuda::CublasTiling{1, 600, 300, 300, 640}, false},
                                        {{1, 600, 300, 300, 640}, true},
                                        {{1, 97, 16, 24, 40}, false},
                                        {{1, 48, 16, 24, 40}, true}}) {
    for (const Shape& shape : shapes()) {
      if (at_once && shape.dtype == DType::fp32) { continue; }
      INFO("dtype " << static_cast<int>(shape.dtype) << ", " << shape.q_rows << " x " << shape.k_rows << " rows, head_dim "
                    << shape.head_dim);
      const Problem problem(shape, 7);
      const double rounding = rounding_of(shape.dtype);

      const Problem::Result expected = problem.reference();
      const Problem::Result found = problem.by_products(tiling, at_once);

      CHECK(largest_difference(found.dq, expected.dq) < rounding);
      CHECK(largest_difference(found.dk, expected.dk) < rounding);
      CHECK(largest_difference(found.dv, expected.dv) < rounding);
    }
  }
}

TEST_CASE("P and dS are made at once of 16-bit elements in aligned rows") {
  Shape shape{DType::bf16, Mask::none, 1, 2, 9, 9, 2, 2, 64, {}, {}};
  const auto at_once = [](const Shape& of) {
    return Problem(of, 1).with_task([](const GradientTask& task) { return cuda::made_at_once(task); });
  };
  CHECK(at_once(shape));
  for (const std::int64_t head_dim : {8, 48, 128}) {
    shape.head_dim = head_dim;
    CHECK(at_once(shape));
  }
  for (const std::int64_t head_dim : {1, 12, 100, 136, 256}) {
    shape.head_dim = head_dim;
    CHECK_FALSE(at_once(shape));
  }
  shape.head_dim = 64;
  shape.dtype = DType::fp32;
  CHECK_FALSE(at_once(shape));
  shape.dtype = DType::fp16;
  CHECK_FALSE(Problem(shape, 1).with_task([](GradientTask task) {
    task.attend.kv_strides.row += 4;
    return cuda::made_at_once(task);
  }));
  CHECK_FALSE(Problem(shape, 1).with_task([](GradientTask task) {
    task.dout = static_cast<const std::byte*>(task.dout) + 2;
    return cuda::made_at_once(task);
  }));
}

#if ANNULUS_TEST_ON_GPU
TEST_CASE("kernel cublas differentiates on a GPU as reference does, but for the rounding of P and dS", "[gpu]") {
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) { return test::skip("no GPU"); }
  std::vector<Shape> all = shapes();
  for (const DType dtype : {DType::fp16, DType::bf16}) {
    all.push_back({dtype, Mask::none, 1, 1, 300, 700, 3, 2, 128, {}, {}});
    all.push_back({dtype, Mask::none, 1, 1, 70, 90, 2, 2, 16, {}, {}});
    all.push_back({dtype, Mask::causal, 2, 1, 257, 333, 2, 1, 64, {76, 1}, {0, 1}});
    all.push_back({dtype, Mask::causal, 1, 2, 130, 520, 1, 3, 96, {100, 3}, {2, 2}});
    all.push_back({dtype, Mask::causal, 1, 1, 400, 400, 1, 1, 32, {0, 1}, {0, 1}});
  }
  for (const cuda::CublasTiling& tiling : {cuda::CublasTiling{2, 600, 300, 300, 640}, cuda::CublasTiling{3, 96, 16, 24, 40}}) {
    for (const Shape& shape : all) {
      INFO("dtype " << static_cast<int>(shape.dtype) << ", " << shape.q_rows << " x " << shape.k_rows << " rows, head_dim "
                    << shape.head_dim);
      const Problem problem(shape, 7);

      const Problem::Result expected = problem.reference();
      const Problem::Result found = problem.by_cublas(tiling);

      CHECK(largest_difference(found.dq, expected.dq) < rounding_of(shape.dtype));
      CHECK(largest_difference(found.dk, expected.dk) < rounding_of(shape.dtype));
      CHECK(largest_difference(found.dv, expected.dv) < rounding_of(shape.dtype));
      const Problem::Result again = problem.by_cublas(tiling);
      CHECK(again.dq == found.dq);
      CHECK(again.dk == found.dk);
      CHECK(again.dv == found.dv);
    }
  }
}
#endif

TEST_CASE("reference differentiates one query and two keys as by hand") {
  // P = (1/4, 3/4); dP = (1, 2), of which the mean is 7/4; dS = P (dP - 7/4) = (-3/16, 3/16).
  const float q = 1.0F;
  const float k[2] = {0.0F, std::log(3.0F)};
  const float v[2] = {1.0F, 2.0F};
  const float dout = 1.0F;
  double dq = 0;
  double max = std::log(4.0);
  double sum = 1.75;
  float dk[2] = {};
  float dv[2] = {};
  GradientTask task;
  AttendTask& at = task.attend;
  at.batch = at.segments = at.q_rows = at.kv_heads = at.q_per_kv = at.head_dim = 1;
  at.k_rows = 2;
  at.q = &q;
  at.k = k;
  at.v = v;
  at.kv_strides.row = 1;
  at.acc = &dq;
  at.max = &max;
  at.sum = &sum;
  task.dout = &dout;
  task.dk = dk;
  task.dv = dv;

  kernels::reference::differentiate(task);

  CHECK(std::abs(dq - 3.0 / 16 * std::log(3.0)) < 1e-7);
  CHECK(std::abs(static_cast<double>(dk[0]) + 3.0 / 16) < 1e-7);
  CHECK(std::abs(static_cast<double>(dk[1]) - 3.0 / 16) < 1e-7);
  CHECK(std::abs(static_cast<double>(dv[0]) - 0.25) < 1e-7);
  CHECK(std::abs(static_cast<double>(dv[1]) - 0.75) < 1e-7);
}

TEST_CASE("partials become what the backward pass takes, by the way they combine") {
  // Two partials of one row: sums 1 and 3 at maximum 0, so outputs 2 and 4; the third is empty.
  for (const Combine combine : {Combine::lse, Combine::mean, Combine::sum}) {
    double acc[3] = {2.0, 12.0, 0.0};
    double max[3] = {0.0, 0.0, -std::numeric_limits<double>::infinity()};
    double sum[3] = {1.0, 3.0, 0.0};
    const float dout = 0.5F;
    BeginGradientsTask task;
    task.forward.combine = combine;
    task.forward.batch = task.forward.rows = task.forward.heads = task.forward.head_dim = 1;
    task.forward.output_scale = 0.25;
    task.forward.partials = 3;
    for (int g = 0; g < 3; ++g) { task.forward.partial[g] = {acc + g, max + g, sum + g}; }
    task.dout = &dout;

    kernels::reference::begin_gradients(task);

    CHECK(acc[0] == 0.0);
    CHECK(std::isinf(max[2]));
    CHECK(max[2] > 0);
    CHECK(sum[2] == 0.0);
    const double factor = combine == Combine::mean ? 0.125 : 0.25;
    const bool together = combine == Combine::lse;
    CHECK(std::abs(max[0] - (std::log(together ? 4.0 : 1.0) - std::log(factor))) < 1e-14);
    CHECK(std::abs(max[1] - (std::log(together ? 4.0 : 3.0) - std::log(factor))) < 1e-14);
    CHECK(std::abs(sum[0] - (together ? 1.75 : 1.0)) < 1e-14);
    CHECK(std::abs(sum[1] - (together ? 1.75 : 2.0)) < 1e-14);
  }
}

TEST_CASE("rows are added where their strides say, and rounded once") {
  const std::vector<float> src{1, 2, 3, 4, 5, 6, 7, 8};  // [1, 2, 2, 2]
  const AddTask shape{1, 2, 2, 2, src.data(), nullptr, 0, 6, 3};
  for (const bool on_cpu : {false, true}) {
    std::vector<float> dst(12, 10.0F);
    AddTask task = shape;
    task.dst = dst.data();
    if (on_cpu) {
      kernels::cpu::add(task, 2);
    } else {
      kernels::reference::add(task);
    }
    CHECK(dst == std::vector<float>{11, 12, 10, 13, 14, 10, 15, 16, 10, 17, 18, 10});
  }

  const std::vector<double> exact{1.0 + 0x1p-8, 1.0 + 0x1p-8 + 0x1p-40};  // a tie in bf16, and just above it
  std::vector<Bf16> rounded(2);
  kernels::reference::round({DType::bf16, 2, 8, exact.data(), rounded.data()});
  CHECK(to_float(rounded[0]) == 1.0F);
  CHECK(to_float(rounded[1]) == 1.0F + 0x1p-7F);
}
