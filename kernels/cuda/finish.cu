// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "check.hpp"
#include "element.cuh"
#include "row_layout.cuh"

namespace annulus::kernels::cuda {
namespace {

/// Largest score of a row and the sum of exp(score - max), over all its partials.
struct RowTotal {
  float max = -INFINITY;
  float sum = 0.0F;
  float covering = 0.0F;  ///< partials that hold a key
};

template <bool kOnePartial>
__device__ __forceinline__ RowTotal total_of(const FinishTask& task, std::int64_t at) {
  RowTotal total;
  const int partials = kOnePartial ? 1 : task.partials;
  for (int g = 0; g < partials; ++g) {
    const float max = static_cast<const float*>(task.partial[g].max)[at];
    const float sum = static_cast<const float*>(task.partial[g].sum)[at];
    if (sum == 0.0F) { continue; }
    const float new_max = fmaxf(total.max, max);
    const float keep = total.sum == 0.0F ? 0.0F : exp_fast(total.max - new_max);
    total.sum = total.sum * keep + sum * exp_fast(max - new_max);
    total.max = new_max;
    total.covering += 1.0F;
  }
  return total;
}

/// Factor of partial g's acc in the output of row `at`; 0 where the partial is empty.
__device__ __forceinline__ float factor_of(const FinishTask& task, int g, std::int64_t at, const RowTotal& total) {
  const float sum = static_cast<const float*>(task.partial[g].sum)[at];
  if (sum == 0.0F) { return 0.0F; }
  const auto scale = static_cast<float>(task.output_scale);
  switch (task.combine) {
    case Combine::lse:
      return scale * exp_fast(static_cast<const float*>(task.partial[g].max)[at] - total.max) / total.sum;
    case Combine::mean:
      return scale / (sum * total.covering);
    case Combine::sum:
      break;
  }
  return scale / sum;
}

/// A group of lanes finishes kRowsAtOnce rows, kWidth neighbours (4 or 1) at a time; `vectors` = head_dim / kWidth.
template <class Element, int kWidth, bool kOnePartial>
__global__ void __launch_bounds__(kRowThreads)
    finish_kernel(const RowBox box, const __grid_constant__ FinishTask task, int vectors, int lanes_log2) {
  const int lane = static_cast<int>(threadIdx.x) & ((1 << lanes_log2) - 1);
  const std::uint32_t groups = static_cast<std::uint32_t>(kRowThreads >> lanes_log2);
  const std::uint32_t first = blockIdx.x * (groups * kRowsAtOnce) + (threadIdx.x >> lanes_log2);

  bool inside[kRowsAtOnce];
  RowPlace place[kRowsAtOnce];
  RowTotal total[kRowsAtOnce];
  float factor[kRowsAtOnce];
#pragma unroll
  for (int u = 0; u < kRowsAtOnce; ++u) {
    const std::uint32_t index = first + static_cast<std::uint32_t>(u) * groups;
    inside[u] = index < box.count;
    factor[u] = 0.0F;
    if (!inside[u]) { continue; }
    place[u] = box.place(index);
    total[u] = total_of<kOnePartial>(task, place[u].stat);
    // One partial: its acc over its sum, whatever the rule.
    if (kOnePartial && total[u].sum != 0.0F) { factor[u] = static_cast<float>(task.output_scale) / total[u].sum; }
    if (lane == 0) { task.lse[place[u].stat] = total[u].sum == 0.0F ? -INFINITY : total[u].max + logf(total[u].sum); }
  }

  auto* out = static_cast<Element*>(task.out);
  for (int d = lane; d < vectors; d += 1 << lanes_log2) {
    if constexpr (kWidth == 4) {
      float4 value[kRowsAtOnce];
      if constexpr (kOnePartial) {
        const auto* acc = static_cast<const float4*>(task.partial[0].acc);
#pragma unroll
        for (int u = 0; u < kRowsAtOnce; ++u) {
          value[u] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
          if (inside[u] && total[u].sum != 0.0F) { value[u] = __ldcs(acc + place[u].acc * vectors + d); }
        }
#pragma unroll
        for (int u = 0; u < kRowsAtOnce; ++u) {
          value[u] = make_float4(value[u].x * factor[u], value[u].y * factor[u], value[u].z * factor[u], value[u].w * factor[u]);
        }
      } else {
#pragma unroll
        for (int u = 0; u < kRowsAtOnce; ++u) { value[u] = make_float4(0.0F, 0.0F, 0.0F, 0.0F); }
        for (int g = 0; g < task.partials; ++g) {
          const auto* acc = static_cast<const float4*>(task.partial[g].acc);
#pragma unroll
          for (int u = 0; u < kRowsAtOnce; ++u) {
            if (!inside[u]) { continue; }
            const float weight = factor_of(task, g, place[u].stat, total[u]);
            if (weight == 0.0F) { continue; }
            const float4 part = __ldcs(acc + place[u].acc * vectors + d);
            value[u] = make_float4(value[u].x + weight * part.x, value[u].y + weight * part.y, value[u].z + weight * part.z,
                                   value[u].w + weight * part.w);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        if (inside[u]) { store4(out + (place[u].acc * vectors + d) * 4, value[u]); }
      }
    } else {
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        if (!inside[u]) { continue; }
        float value = 0.0F;
        for (int g = 0; g < task.partials; ++g) {
          const float weight = kOnePartial ? factor[u] : factor_of(task, g, place[u].stat, total[u]);
          if (weight != 0.0F) { value += weight * static_cast<const float*>(task.partial[g].acc)[place[u].acc * vectors + d]; }
        }
        out[place[u].acc * vectors + d] = to_element<Element>(value);
      }
    }
  }
}

template <class Element, int kWidth>
void launch(const RowBox& box, const FinishTask& task, int vectors, int lanes_log2, CUstream_st* stream) {
  const unsigned blocks = row_blocks(box.count, lanes_log2);
  if (task.partials == 1) {
    finish_kernel<Element, kWidth, true><<<blocks, kRowThreads, 0, stream>>>(box, task, vectors, lanes_log2);
  } else {
    finish_kernel<Element, kWidth, false><<<blocks, kRowThreads, 0, stream>>>(box, task, vectors, lanes_log2);
  }
  check_launch("finish_kernel");
}

}  // namespace

void finish(const FinishTask& task, CUstream_st* stream) {
  bool vectorised = task.head_dim % 4 == 0 && is_aligned(task.out, static_cast<std::uintptr_t>(4 * size_of(task.dtype)));
  for (int g = 0; g < task.partials; ++g) { vectorised = vectorised && is_aligned(task.partial[g].acc, 16); }
  const int vectors = to_int(vectorised ? task.head_dim / 4 : task.head_dim);
  const int lanes_log2 = log2_lanes(vectors);
  with_device_element(task.dtype, [&](auto tag) {
    using Element = decltype(tag);
    for_each_row_box(task.batch, task.rows, task.heads, [&](const RowBox& box) {
      if (vectorised) {
        launch<Element, 4>(box, task, vectors, lanes_log2, stream);
      } else {
        launch<Element, 1>(box, task, vectors, lanes_log2, stream);
      }
    });
  });
}

}  // namespace annulus::kernels::cuda
