// SPDX-License-Identifier: Apache-2.0
// The softmax between the two products. The scores are the traffic: each is read once from the L2 cache and its probability written once.
#pragma once

#include "check.hpp"
#include "element.cuh"
#include "row_layout.cuh"
#include "tile.hpp"

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace annulus::kernels::cuda {

__device__ __forceinline__ InstanceOffsets offsets_of(const InstanceMap& map, int instance) {
  InstanceOffsets at;
  auto rest = static_cast<unsigned>(map.first + instance);
  for (int a = map.axes - 1; a >= 0; --a) {
    const InstanceAxis& axis = map.axis[a];
    const auto count = static_cast<unsigned>(axis.count);
    const std::int64_t index = a == 0 ? rest : rest % count;
    rest /= count;
    at.q += index * axis.stride.q;
    at.kv += index * axis.stride.kv;
    at.acc += index * axis.stride.acc;
    at.stat += index * axis.stride.stat;
  }
  return at;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) { value = fmaxf(value, __shfl_xor_sync(0xffffffffU, value, step)); }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) { value += __shfl_xor_sync(0xffffffffU, value, step); }
  return value;
}

inline constexpr int kSoftmaxWarps = 4;

/// One warp per row, the row in its registers: lane l holds columns 128 v + 4 l .. + 3 of vector v. All loads of a row are in flight
/// together. kMasked: columns from `visible` on count as -inf, which serves the causal mask and a row that does not fill its vectors.
template <class Element, int kVectors, bool kMasked>
__global__ void __launch_bounds__(32 * kSoftmaxWarps) softmax_kernel(const __grid_constant__ SoftmaxTile tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(blockIdx.x * kSoftmaxWarps + threadIdx.x / 32);
  if (row >= tile.rows) { return; }
  const auto instance = static_cast<int>(blockIdx.y);
  float* const row_scores = tile.scores + instance * tile.instance_stride + row * tile.ld;

  int visible = tile.cols;
  if (kMasked && tile.causal) {
    const std::int64_t ahead = tile.lead + row * tile.q_stride;
    if (ahead < 0) {
      visible = 0;
    } else {
      const std::int64_t keys = ahead / tile.k_stride + 1;
      if (keys < visible) { visible = static_cast<int>(keys); }
    }
  }

  float4 x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = 128 * v + 4 * lane;
    if (!kMasked || column < visible) {
      x[v] = __ldcg(reinterpret_cast<const float4*>(row_scores + column));
    } else {
      x[v] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    }
  }
  const InstanceOffsets at = offsets_of(tile.map, instance);
  float* const max_at = tile.max + at.stat + row * tile.stat_row_stride;
  float* const sum_at = tile.sum + at.stat + row * tile.stat_row_stride;
  const float old_max = *max_at;
  const float old_sum = *sum_at;

  if (kMasked) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = 128 * v + 4 * lane;
      if (column + 1 >= visible) { x[v].y = -INFINITY; }
      if (column + 2 >= visible) { x[v].z = -INFINITY; }
      if (column + 3 >= visible) { x[v].w = -INFINITY; }
    }
  }
  float largest = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) { largest = fmaxf(largest, fmaxf(fmaxf(x[v].x, x[v].y), fmaxf(x[v].z, x[v].w))); }
  largest = warp_max(largest);
  const float new_max = fmaxf(old_max, largest);
  // A row that has seen nothing yet subtracts 0, so that -inf never meets -inf.
  const float base = new_max == -INFINITY ? 0.0F : new_max;

  // The warp that raises a row's maximum rescales the row's output; an empty row's is 0 already.
  const bool rescale = new_max > old_max && old_sum != 0.0F;
  const float keep = rescale ? exp_fast(old_max - base) : 1.0F;
  float* const acc = tile.acc + at.acc + row * tile.acc_row_stride;
  constexpr int kAccVectors = 2;  // head_dim is at most 256
  float4 output[kAccVectors];
  if (rescale && tile.acc_vectorised) {
#pragma unroll
    for (int i = 0; i < kAccVectors; ++i) {
      const int d = 128 * i + 4 * lane;
      if (d < tile.head_dim) { output[i] = *reinterpret_cast<const float4*>(acc + d); }
    }
  }

  // Every lane's scores have been read once the maximum is known, so the row may be overwritten. The difference is taken before the factor
  // log2(e): the largest score gets probability 1 exactly, and rounding does not depend on how large the scores are.
  auto* const probabilities = reinterpret_cast<Element*>(row_scores);
  float partial_sum = 0.0F;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = 128 * v + 4 * lane;
    float4 p;
    p.x = exp_fast(x[v].x - base);
    p.y = exp_fast(x[v].y - base);
    p.z = exp_fast(x[v].z - base);
    p.w = exp_fast(x[v].w - base);
    partial_sum += (p.x + p.y) + (p.z + p.w);
    if (!kMasked || column < tile.cols) { store4(probabilities + column, p); }
  }
  const float tile_sum = warp_sum(partial_sum);

  if (rescale) {
    if (tile.acc_vectorised) {
#pragma unroll
      for (int i = 0; i < kAccVectors; ++i) {
        const int d = 128 * i + 4 * lane;
        if (d < tile.head_dim) {
          *reinterpret_cast<float4*>(acc + d) = make_float4(output[i].x * keep, output[i].y * keep, output[i].z * keep, output[i].w * keep);
        }
      }
    } else {
      for (int d = lane; d < tile.head_dim; d += 32) { acc[d] *= keep; }
    }
  }
  if (lane == 0) {
    *max_at = new_max;
    *sum_at = old_sum * keep + tile_sum;
  }
}

template <class Element, int kVectors>
void launch_softmax(const SoftmaxTile& tile, CUstream_st* stream) {
  const dim3 grid(static_cast<unsigned>((tile.rows + kSoftmaxWarps - 1) / kSoftmaxWarps), static_cast<unsigned>(tile.instances));
  if (tile.causal || tile.cols != 128 * kVectors) {
    softmax_kernel<Element, kVectors, true><<<grid, 32 * kSoftmaxWarps, 0, stream>>>(tile);
  } else {
    softmax_kernel<Element, kVectors, false><<<grid, 32 * kSoftmaxWarps, 0, stream>>>(tile);
  }
  check_launch("softmax_kernel");
}

/// The device's element type of a storage tag.
template <class Tag>
using DeviceElement =
    std::conditional_t<std::is_same_v<Tag, float>, float, std::conditional_t<std::is_same_v<Tag, Fp16>, __half, __nv_bfloat16>>;

template <class Tag>
void softmax_tile_as(const SoftmaxTile& tile, CUstream_st* stream) {
  using Element = DeviceElement<Tag>;
  const int vectors = (tile.cols + 127) / 128;
  if (vectors <= 1) { return launch_softmax<Element, 1>(tile, stream); }
  if (vectors <= 2) { return launch_softmax<Element, 2>(tile, stream); }
  if (vectors <= 4) { return launch_softmax<Element, 4>(tile, stream); }
  if (vectors <= 8) { return launch_softmax<Element, 8>(tile, stream); }
  if (vectors <= 12) { return launch_softmax<Element, 12>(tile, stream); }
  if (vectors <= 16) { return launch_softmax<Element, 16>(tile, stream); }
  if (vectors <= 24) { return launch_softmax<Element, 24>(tile, stream); }
  if (vectors <= 32) { return launch_softmax<Element, 32>(tile, stream); }
  throw std::invalid_argument("a tile has too many keys");
}

}  // namespace annulus::kernels::cuda
