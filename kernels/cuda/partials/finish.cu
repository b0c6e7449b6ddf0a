// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"
#include "element.cuh"
#include "row_layout.cuh"

#include <cstddef>
#include <cstdint>

namespace annulus::kernels::cuda {
namespace {

/// A block finishes as many rows as it has threads: each thread first weighs one row, then all share the rows' vectors.
constexpr int kThreads = 128;
/// Vectors of a thread in flight. The block spends one latency on the rows' statistics and then streams.
constexpr int kAtOnce = 8;
/// Blocks that a multiprocessor must hold. Left to itself the compiler goes for more, with registers for three loads in flight.
constexpr int kBlocks = 5;

/// Largest score of a row and the sum of exp(score - max), over all its partials.
struct RowTotal {
  float max = -INFINITY;
  float sum = 0.0F;
  float covering = 0.0F;  ///< partials that hold a key, but for that of keys which every row sees
};

__device__ __forceinline__ float max_of(const FinishTask& task, int g, std::int64_t at) {
  return __ldg(static_cast<const float*>(task.partial[g].max) + at);
}
__device__ __forceinline__ float sum_of(const FinishTask& task, int g, std::int64_t at) {
  return __ldg(static_cast<const float*>(task.partial[g].sum) + at);
}

/// Selects instead of branches, so that the loads of several partials are in flight together.
__device__ __forceinline__ RowTotal total_of(const FinishTask& task, std::int64_t at) {
  RowTotal total;
#pragma unroll 4
  for (int g = 0; g < task.partials; ++g) {
    const float max = max_of(task, g, at);
    const float sum = sum_of(task, g, at);
    const bool empty = sum == 0.0F;
    const float new_max = empty ? total.max : fmaxf(total.max, max);
    const float kept = total.sum == 0.0F ? 0.0F : total.sum * exp_fast(total.max - new_max);
    total.sum = empty ? kept : kept + sum * exp_fast(max - new_max);
    total.max = new_max;
    total.covering += empty || g == task.extra ? 0.0F : 1.0F;
  }
  return total;
}

/// Factors of the acc of a partial and of that of the extra keys, which are one softmax together.
struct Together {
  float own = 0.0F;
  float extra = 0.0F;
};
__device__ __forceinline__ Together together(const FinishTask& task, int g, std::int64_t at) {
  const float max = max_of(task, g, at);
  const float max_of_extra = max_of(task, task.extra, at);
  const float larger = fmaxf(max, max_of_extra);
  const float own = exp_fast(max - larger);
  const float extra = exp_fast(max_of_extra - larger);
  const float both = own * sum_of(task, g, at) + extra * sum_of(task, task.extra, at);
  return {own / both, extra / both};
}

/// weight_of() under mean and sum, where there are extra keys, but for the scale and the mean's divisor.
__device__ __forceinline__ float weight_with_extra(const FinishTask& task, int g, std::int64_t at, const RowTotal& total) {
  if (g != task.extra) { return together(task, g, at).own; }
  if (total.covering == 0.0F) { return 1.0F / sum_of(task, g, at); }
  float weight = 0.0F;
  for (int other = 0; other < task.partials; ++other) {
    if (other != task.extra && sum_of(task, other, at) != 0.0F) { weight += together(task, other, at).extra; }
  }
  return weight;
}

/// Factor of partial g's acc in the output of row `at`; 0 where the partial is empty.
__device__ __forceinline__ float weight_of(const FinishTask& task, int g, std::int64_t at, const RowTotal& total) {
  const float sum = sum_of(task, g, at);
  if (sum == 0.0F) { return 0.0F; }
  const auto scale = static_cast<float>(task.output_scale);
  switch (task.combine) {
    case Combine::lse:
      return scale * exp_fast(max_of(task, g, at) - total.max) / total.sum;
    case Combine::mean:
      if (task.extra >= 0) { return scale * weight_with_extra(task, g, at, total) / fmaxf(total.covering, 1.0F); }
      return scale / (sum * total.covering);
    case Combine::sum:
      break;
  }
  return task.extra >= 0 ? scale * weight_with_extra(task, g, at, total) : scale / sum;
}

/// What lies at `from` (global memory, read once), or zeros unless `wanted`. One predicated instruction: behind a branch the compiler keeps
/// two loads in flight, however many a loop has.
__device__ __forceinline__ float4 load_if(bool wanted, const float4* from) {
  float4 value = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  asm volatile("{ .reg .pred wanted; setp.ne.s32 wanted, %4, 0; @wanted ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%5]; }"
               : "+f"(value.x), "+f"(value.y), "+f"(value.z), "+f"(value.w)
               : "r"(static_cast<int>(wanted)), "l"(__cvta_generic_to_global(from)));
  return value;
}
__device__ __forceinline__ float load_if(bool wanted, const float* from) {
  float value = 0.0F;
  asm volatile("{ .reg .pred wanted; setp.ne.s32 wanted, %1, 0; @wanted ld.global.cs.f32 %0, [%2]; }"
               : "+f"(value)
               : "r"(static_cast<int>(wanted)), "l"(__cvta_generic_to_global(from)));
  return value;
}

__device__ __forceinline__ void add_scaled(float4& value, float weight, float4 part) {
  value.x += weight * part.x;
  value.y += weight * part.y;
  value.z += weight * part.z;
  value.w += weight * part.w;
}
__device__ __forceinline__ void add_scaled(float& value, float weight, float part) { value += weight * part; }

template <class Element>
__device__ __forceinline__ void store(Element* to, float4 value) {
  store4_streaming(to, value);
}
template <class Element>
__device__ __forceinline__ void store(Element* to, float value) {
  *to = to_element<Element>(value);
}

/// `Vector` is float4 or float; a row has divide_vectors.divisor() of them. Shared memory: a weight for each partial and row of the block.
template <class Element, class Vector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    finish_kernel(const RowBox box, const __grid_constant__ FinishTask task, const FastDivide divide_vectors) {
  extern __shared__ float s_weight[];
  const std::uint32_t first = blockIdx.x * kThreads;
  const std::uint32_t rows = min(static_cast<std::uint32_t>(kThreads), box.count - first);
  if (threadIdx.x < rows) {
    const std::int64_t at = box.place(first + threadIdx.x).stat;
    const RowTotal total = total_of(task, at);
#pragma unroll 1
    for (int g = 0; g < task.partials; ++g) { s_weight[g * kThreads + threadIdx.x] = weight_of(task, g, at, total); }
    task.lse[at] = total.sum == 0.0F ? -INFINITY : total.max + logf(total.sum);
  }
  __syncthreads();

  const std::uint32_t count = rows * divide_vectors.divisor();
  const std::int64_t begin = box.place(first).acc * static_cast<std::int64_t>(divide_vectors.divisor());
  constexpr int kWidth = sizeof(Vector) / sizeof(float);
  auto* const out = static_cast<Element*>(task.out) + begin * kWidth;
  for (std::uint32_t start = threadIdx.x; start < count; start += kThreads * kAtOnce) {
    Vector value[kAtOnce];
    std::uint32_t row[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      value[u] = Vector{};
      row[u] = divide_vectors(start + static_cast<std::uint32_t>(u * kThreads));
    }
    for (int g = 0; g < task.partials; ++g) {
      const auto* const acc = static_cast<const Vector*>(task.partial[g].acc) + begin;
      const float* const s_row_weight = s_weight + g * kThreads;
      Vector part[kAtOnce];
      float weight[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        weight[u] = start + static_cast<std::uint32_t>(u * kThreads) < count ? s_row_weight[row[u]] : 0.0F;
      }
      // A partial of a dilated branch is empty in most rows: those are not read.
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) { part[u] = load_if(weight[u] != 0.0F, acc + start + u * kThreads); }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) { add_scaled(value[u], weight[u], part[u]); }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const std::uint32_t index = start + static_cast<std::uint32_t>(u * kThreads);
      if (index < count) { store(out + index * static_cast<std::uint32_t>(kWidth), value[u]); }
    }
  }
}

template <class Element, class Vector>
void launch(const RowBox& box, const FinishTask& task, std::int64_t vectors, CUstream_st* stream) {
  const unsigned blocks = (box.count + kThreads - 1) / kThreads;
  const std::size_t shared_bytes = static_cast<std::size_t>(task.partials) * kThreads * sizeof(float);
  finish_kernel<Element, Vector><<<blocks, kThreads, shared_bytes, stream>>>(box, task, FastDivide(static_cast<std::uint32_t>(vectors)));
  check_launch("finish_kernel");
}

}  // namespace

void finish(const FinishTask& task, CUstream_st* stream) {
  // What a block counts stays below 2^31, steps beyond its end included.
  static_cast<void>(to_int((task.head_dim + kAtOnce) * kThreads));
  bool vectorised = task.head_dim % 4 == 0 && is_aligned(task.out, static_cast<std::uintptr_t>(4 * size_of(task.dtype)));
  for (int g = 0; g < task.partials; ++g) { vectorised = vectorised && is_aligned(task.partial[g].acc, 16); }
  with_device_element(task.dtype, [&](auto tag) {
    using Element = decltype(tag);
    for_each_row_box(task.batch, task.rows, task.heads, [&](const RowBox& box) {
      if (vectorised) {
        launch<Element, float4>(box, task, task.head_dim / 4, stream);
      } else {
        launch<Element, float>(box, task, task.head_dim, stream);
      }
    });
  });
}

}  // namespace annulus::kernels::cuda
