// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"
#include "element.cuh"
#include "row_layout.cuh"

#include <cstdint>

namespace annulus::kernels::cuda {
namespace {

struct Pointers {
  float* acc;
  float* max;
  float* sum;
};

/// A group of lanes folds kRowsAtOnce rows. `Vector` is float4 or float; head_dim counts Vectors.
/// With m = max(m1, m2): acc = acc1 e^(m1-m) + acc2 e^(m2-m), the sums alike. A row whose part is empty is left as it is.
template <class Vector>
__global__ void __launch_bounds__(kRowThreads)
    merge_kernel(const RowBox box, const Pointers part, const Pointers into, int vectors, int lanes_log2) {
  const int lane = static_cast<int>(threadIdx.x) & ((1 << lanes_log2) - 1);
  const std::uint32_t groups = static_cast<std::uint32_t>(kRowThreads >> lanes_log2);
  const std::uint32_t first = blockIdx.x * (groups * kRowsAtOnce) + (threadIdx.x >> lanes_log2);

  bool active[kRowsAtOnce];
  std::int64_t acc_at[kRowsAtOnce];
  std::int64_t stat_at[kRowsAtOnce];
  float part_weight[kRowsAtOnce];
  float into_weight[kRowsAtOnce];
  float max[kRowsAtOnce];
  float sum[kRowsAtOnce];
#pragma unroll
  for (int u = 0; u < kRowsAtOnce; ++u) {
    const std::uint32_t index = first + static_cast<std::uint32_t>(u) * groups;
    active[u] = index < box.count;
    if (!active[u]) { continue; }
    const RowPlace place = box.place(index);
    acc_at[u] = place.acc * vectors;
    stat_at[u] = place.stat;
    const float part_max = part.max[place.stat];
    const float part_sum = part.sum[place.stat];
    const float into_max = into.max[place.stat];
    const float into_sum = into.sum[place.stat];
    active[u] = part_sum != 0.0F;
    max[u] = fmaxf(part_max, into_max);
    part_weight[u] = exp_fast(part_max - max[u]);
    into_weight[u] = into_sum == 0.0F ? 0.0F : exp_fast(into_max - max[u]);
    sum[u] = into_sum * into_weight[u] + part_sum * part_weight[u];
  }
  // Every lane of a group has read the row's old numbers before one of them writes the new ones.
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (active[u]) {
        into.max[stat_at[u]] = max[u];
        into.sum[stat_at[u]] = sum[u];
      }
    }
  }

  const auto* from = reinterpret_cast<const Vector*>(part.acc);
  auto* to = reinterpret_cast<Vector*>(into.acc);
  for (int d = lane; d < vectors; d += 1 << lanes_log2) {
    Vector a[kRowsAtOnce];
    Vector b[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (active[u]) {
        a[u] = __ldcs(from + acc_at[u] + d);
        b[u] = to[acc_at[u] + d];
      }
    }
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (!active[u]) { continue; }
      const float p = part_weight[u];
      const float q = into_weight[u];
      if constexpr (sizeof(Vector) == sizeof(float4)) {
        to[acc_at[u] + d] = make_float4(a[u].x * p + b[u].x * q, a[u].y * p + b[u].y * q, a[u].z * p + b[u].z * q, a[u].w * p + b[u].w * q);
      } else {
        to[acc_at[u] + d] = a[u] * p + b[u] * q;
      }
    }
  }
}

Pointers typed(const PartialPointers& partial) {
  return {static_cast<float*>(partial.acc), static_cast<float*>(partial.max), static_cast<float*>(partial.sum)};
}

}  // namespace

void merge(const MergeTask& task, CUstream_st* stream) {
  const bool vectorised = task.head_dim % 4 == 0 && is_aligned(task.part.acc, 16) && is_aligned(task.into.acc, 16);
  const int vectors = to_int(vectorised ? task.head_dim / 4 : task.head_dim);
  const int lanes_log2 = log2_lanes(vectors);
  for_each_row_box(task.batch, task.rows, task.heads, [&](const RowBox& box) {
    const unsigned blocks = row_blocks(box.count, lanes_log2);
    if (vectorised) {
      merge_kernel<float4><<<blocks, kRowThreads, 0, stream>>>(box, typed(task.part), typed(task.into), vectors, lanes_log2);
    } else {
      merge_kernel<float><<<blocks, kRowThreads, 0, stream>>>(box, typed(task.part), typed(task.into), vectors, lanes_log2);
    }
    check_launch("merge_kernel");
  });
}

}  // namespace annulus::kernels::cuda
