// SPDX-License-Identifier: Apache-2.0
// Partials of the fused kernel to rows of O and LSE, where a head has several branches or a row none. One warp for each row of a head.
#include <annulus/kernels/fused.hpp>

#include "check.hpp"
#include "element.cuh"
#include "zero_keys.cuh"

#include <cstdint>
#include <stdexcept>
#include <string>

namespace annulus::kernels::cuda::fused {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = ~0U;
/// Groups of 8 columns that a lane works on at most: four lanes share a group.
constexpr int kMostGroups = 4;

/// Where the partial of a row lies.
struct RowPlace {
  const float4* unit = nullptr;  ///< the partial of its 64 rows
  int row = 0;                   ///< of these
  float zero_keys = 0.0F;        ///< that the row sees besides
  bool extra = false;            ///< whether it is of the keys that every row sees
};

/// Whether `row` is row `index` of segment `segment` of an entry.
__device__ __forceinline__ bool find(const CombineEntry& entry, std::int64_t row, std::int64_t& segment, std::int64_t& index) {
  const std::int64_t from_first = row - entry.first;
  if (from_first < 0) { return false; }
  segment = entry.segments > 1 ? from_first / entry.segment_stride : 0;
  const std::int64_t inside = from_first - segment * entry.segment_stride;
  index = inside / entry.stride;
  return segment < entry.segments && index < entry.count && index * entry.stride == inside;
}

/// Calls `use(place)` for the partial of each entry that holds the row, in the order of the entries. Whole warps.
template <class Use>
__device__ __forceinline__ void for_each_partial(const CombineTask& task, int vectors, std::int64_t batch, std::int64_t row, int head,
                                                 int lane, Use&& use) {
  const std::int32_t end = __ldg(task.begin + head + 1);
  for (std::int32_t first = __ldg(task.begin + head); first < end; first += kWarpSize) {
    std::int64_t unit = 0;
    int in_unit = 0;
    float zero_keys = 0.0F;
    bool holds = false;
    bool extra = false;
    if (first + lane < end) {
      const CombineEntry entry = task.entries[first + lane];
      std::int64_t segment = 0;
      std::int64_t index = 0;
      holds = find(entry, row, segment, index);
      unit = entry.partial + batch * entry.batch_step + segment * entry.segment_step + index / kGroupRows;
      in_unit = static_cast<int>(index % kGroupRows);
      zero_keys = static_cast<float>(entry.zero_keys);
      extra = entry.extra;
    }
    const unsigned extras = __ballot_sync(kAllLanes, extra);
    for (unsigned hits = __ballot_sync(kAllLanes, holds); hits != 0; hits &= hits - 1) {
      const int hit = __ffs(static_cast<int>(hits)) - 1;
      const std::int64_t hit_unit = __shfl_sync(kAllLanes, unit, hit);
      use(RowPlace{static_cast<const float4*>(task.partial) + hit_unit * vectors, __shfl_sync(kAllLanes, in_unit, hit),
                   __shfl_sync(kAllLanes, zero_keys, hit), (extras >> hit & 1U) != 0});
    }
  }
}

/// Vector of a partial in which a lane of four finds its two columns of a row in group 0: a lane of the kernel held rows r and r + 8.
__device__ __forceinline__ int vector_of(int row, int quad) { return row / 16 * kWarpSize + row % 8 * 4 + quad; }
__device__ __forceinline__ bool is_upper(int row) { return row % 16 >= 8; }

/// What a partial and the keys of zeros besides it come to.
struct Statistics {
  float max = 0.0F;     ///< that the row is scaled by, in units of log2
  float sum = 0.0F;     ///< of 2^(score - max)
  float factor = 1.0F;  ///< of the partial's O, which was scaled by its own maximum
};

/// All lanes get the same.
__device__ __forceinline__ Statistics statistics(const RowPlace& place, int groups, int lane) {
  const float4 four = place.unit[groups * 128 + vector_of(place.row, lane % 4)];
  const bool upper = is_upper(place.row);
  float sum = upper ? four.w : four.z;
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  Statistics all{upper ? four.y : four.x, sum};
  if (place.zero_keys > 0.0F) { all.factor = add_zero_keys(all.max, all.sum, place.zero_keys); }
  return all;
}

template <class Element>
__device__ __forceinline__ void store_pair(Element* to, float a, float b) {
  to[0] = to_element<Element>(a);
  to[1] = to_element<Element>(b);
}

template <class Element>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineTask task, int groups, int vectors) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (number >= task.batch * task.rows * task.heads) { return; }
  const int head = static_cast<int>(number % task.heads);
  const std::int64_t row = number / task.heads % task.rows;
  const std::int64_t batch = number / task.heads / task.rows;

  float max = -INFINITY;  // of the branches' log-sum-exp
  int covering = 0;       // without the extra keys
  Statistics extra;
  for_each_partial(task, vectors, batch, row, head, lane, [&](const RowPlace& place) {
    const Statistics branch = statistics(place, groups, lane);
    if (branch.sum == 0.0F) { return; }
    max = fmaxf(max, branch.max + log2f(branch.sum));
    if (place.extra) {
      extra = branch;
    } else {
      ++covering;
    }
  });
  float total = 0.0F;
  float weight_of_extra = 0.0F;  // under mean and sum: what the branches take of them
  float2 acc[kMostGroups] = {};
  for_each_partial(task, vectors, batch, row, head, lane, [&](const RowPlace& place) {
    const Statistics branch = statistics(place, groups, lane);
    if (branch.sum == 0.0F) { return; }
    // At most 1: the largest score that a row is scaled by is no larger than its log-sum-exp.
    const float share = exp2_fast(branch.max - max);
    total += share * branch.sum;
    float weight = share;
    if (task.combine != Combine::lse) {
      if (place.extra) {
        weight = covering > 0 ? weight_of_extra : 1.0F / branch.sum;
      } else if (extra.sum != 0.0F) {
        // One softmax over the branch's keys and the extra ones.
        const float larger = fmaxf(branch.max, extra.max);
        const float own = exp2_fast(branch.max - larger);
        const float others = exp2_fast(extra.max - larger);
        const float both = own * branch.sum + others * extra.sum;
        weight = own / both;
        weight_of_extra += others / both;
      } else {
        weight = 1.0F / branch.sum;
      }
    }
    weight *= branch.factor;
    const float4* const from = place.unit + vector_of(place.row, lane % 4);
    const bool upper = is_upper(place.row);
#pragma unroll
    for (int i = 0; i < kMostGroups; ++i) {
      const int group = lane / 4 + 8 * i;
      if (group >= groups) { break; }
      const float4 four = from[group * 128];
      acc[i].x += weight * (upper ? four.z : four.x);
      acc[i].y += weight * (upper ? four.w : four.y);
    }
  });
  const bool empty = covering == 0 && extra.sum == 0.0F;
  float scale = empty ? 0.0F : task.output_scale;
  switch (task.combine) {
    case Combine::lse:
      if (!empty) { scale /= total; }
      break;
    case Combine::mean:
      if (covering > 0) { scale /= static_cast<float>(covering); }
      break;
    case Combine::sum:
      break;
  }
  auto* const out = static_cast<Element*>(task.out) + number * task.head_dim;
#pragma unroll
  for (int i = 0; i < kMostGroups; ++i) {
    const int column = 8 * (lane / 4 + 8 * i) + 2 * (lane % 4);
    if (column < task.head_dim) { store_pair(out + column, acc[i].x * scale, acc[i].y * scale); }
  }
  constexpr float kLn2 = 0.6931471805599453F;
  if (lane == 0) { task.lse[(batch * task.heads + head) * task.rows + row] = empty ? -INFINITY : (max + log2f(total)) * kLn2; }
}

}  // namespace

void combine(const CombineTask& task, CUstream_st* stream) {
  const std::int64_t rows = task.batch * task.rows * task.heads;
  if (rows == 0) { return; }
  const int shape = shape_of(task.head_dim);
  if (shape < 0) { throw std::invalid_argument("head_dim " + std::to_string(task.head_dim) + " is not one of the fused kernel"); }
  const int head_dim = kTileShapes[shape].head_dim;
  constexpr std::int64_t kRowsOfBlock = kThreads / kWarpSize;
  const auto blocks = static_cast<unsigned>(to_int((rows + kRowsOfBlock - 1) / kRowsOfBlock));
  const int groups = head_dim / 8;
  const int vectors = static_cast<int>(partial_vectors(head_dim));
  switch (task.dtype) {
    case DType::fp16:
      combine_kernel<__half><<<blocks, kThreads, 0, stream>>>(task, groups, vectors);
      break;
    case DType::bf16:
      combine_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(task, groups, vectors);
      break;
    case DType::fp32:
      throw std::invalid_argument("the fused kernel takes bf16 and fp16");
  }
  check_launch("combine_kernel");
}

}  // namespace annulus::kernels::cuda::fused
