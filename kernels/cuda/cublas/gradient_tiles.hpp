// SPDX-License-Identifier: Apache-2.0
// How the backward pass of kernel cublas is cut into tiles, and the five products of each, on the host alone.
#pragma once

#include <annulus/kernels/cublas.hpp>
#include <annulus/kernels/tasks.hpp>
#include <annulus/kernels/visible_keys.hpp>

#include "extents.hpp"
#include "gradient_scores.hpp"
#include "instances.hpp"
#include "tiling.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace annulus::kernels::cuda {

/// Query rows [q_begin, q_begin + rows) by keys [k_begin, k_begin + cols) of some instances with KV heads of their own: what one product
/// adds to is added to by no other of its batch.
struct GradientTile {
  InstanceOffsets base;  ///< of the first instance
  InstanceOffsets step;  ///< to the next
  std::int64_t instances = 1;
  std::int64_t q_begin = 0;
  std::int64_t rows = 0;
  std::int64_t k_begin = 0;
  std::int64_t cols = 0;
  bool masked = false;     ///< some key of the tile is hidden from some row
  std::int64_t chain = 0;  ///< tiles of one chain follow each other and may add to the same rows; those of two never do
};

/// A batch of column-major products c = beta c + alpha op(a) op(b), op(a) [m x k], op(b) [k x n], c [m x n] fp32; the operands are in the
/// task's dtype.
struct GradientProduct {
  bool a_transposed = false;
  bool b_transposed = false;
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  float alpha = 1.0F;
  const void* a = nullptr;
  std::int64_t lda = 0;
  std::int64_t stride_a = 0;
  const void* b = nullptr;
  std::int64_t ldb = 0;
  std::int64_t stride_b = 0;
  float beta = 0.0F;
  float* c = nullptr;
  std::int64_t ldc = 0;
  std::int64_t stride_c = 0;
  std::int64_t batches = 1;
};

/// Where P of a tile, and behind it dS, lie in the task's dtype: row-major with this many floats from row to row. Where they are not made
/// at once, the scores and the products <dO, v> lie there first, as floats.
struct GradientScratch {
  float* scores = nullptr;
  float* products = nullptr;
  std::int64_t ld = 0;
  std::int64_t instance_stride = 0;
};

/// Bytes of the two matrices in 16 bits for any tile of this tiling, or as floats for any of tiling_of_floats().
std::int64_t gradient_scratch_bytes(const CublasTiling& tiling);
/// Tiles of half the rows.
CublasTiling tiling_of_floats(CublasTiling tiling);
/// The scratch of one tile in so many bytes: of 16-bit elements, or of floats. `tiling` is the whole one.
GradientScratch scratch_of_elements(const CublasTiling& tiling, const GradientTile& tile, std::byte* memory);
GradientScratch scratch_of_floats(const CublasTiling& tiling, const GradientTile& tile, std::byte* memory);

/// What P and dS of a tile are made of at once.
GradientOperands gradient_operands(const GradientTask& task, const GradientTile& tile);
/// Whether P and dS can be made at once: 16-bit elements, a head_dim that gradient_probabilities() takes, and rows aligned to 16 bytes.
bool made_at_once(const GradientTask& task);

/// S = scale Q K^T and dP = dO V^T.
std::array<GradientProduct, 2> score_products(const GradientTask& task, const GradientTile& tile, const GradientScratch& scratch);
/// dV += P^T dO, dK += dS^T Q and dQ += dS K, once the scratch holds P and dS.
std::array<GradientProduct, 3> gradient_products(const GradientTask& task, const GradientTile& tile, const GradientScratch& scratch);

/// Query rows of one head in a tile, at most.
inline std::int64_t query_tile(Mask mask, const CublasTiling& tiling) {
  switch (mask) {
    case Mask::causal:
      return tiling.causal_q_tile;
    case Mask::none:
      break;
  }
  return tiling.q_tile;
}

/// Calls visit(tile) for tiles that together meet every (query, key) that see each other once. Query heads of one KV head are one chain,
/// since they add to the same dK and dV.
template <class Visit>
void for_each_gradient_tile(const AttendTask& task, const CublasTiling& tiling, Visit&& visit) {
  struct Axis {
    std::int64_t count;
    InstanceOffsets stride;
  };
  const auto axis = [&](std::int64_t count, std::int64_t TaskStrides::* stride, bool of_kv) {
    return Axis{count, {task.q_strides.*stride, of_kv ? task.kv_strides.*stride : 0, task.acc_strides.*stride, task.stat_strides.*stride}};
  };
  std::array<Axis, 3> axes{axis(task.batch, &TaskStrides::batch, true), axis(task.segments, &TaskStrides::segment, true),
                           axis(task.kv_heads, &TaskStrides::kv_head, true)};
  std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.count < b.count; });  // the last one is a batch
  const Axis heads = axis(task.q_per_kv, &TaskStrides::head, false);
  const std::int64_t q_step = std::min({task.q_rows, query_tile(task.mask, tiling), tiling.rows});
  const std::int64_t group = std::clamp<std::int64_t>(tiling.rows / q_step, 1, axes[2].count);
  const auto first_that_sees = [&](std::int64_t begin, std::int64_t end, std::int64_t keys) {
    while (begin < end && visible_keys(task, begin) <= keys) { ++begin; }
    return begin;
  };
  for (std::int64_t outer = 0; outer < axes[0].count * axes[1].count * heads.count; ++outer) {
    const std::int64_t head = outer % heads.count;
    const std::int64_t rest = outer / heads.count;
    const InstanceOffsets at = rest / axes[1].count * axes[0].stride + rest % axes[1].count * axes[1].stride + head * heads.stride;
    for (std::int64_t first = 0; first < axes[2].count; first += group) {
      for (std::int64_t k_begin = 0; k_begin < task.k_rows; k_begin += tiling.k_tile) {
        for (std::int64_t q_begin = 0; q_begin < task.q_rows; q_begin += q_step) {
          const std::int64_t q_end = std::min(q_begin + q_step, task.q_rows);
          GradientTile tile;
          tile.chain = rest * ceil_div(axes[2].count, group) + first / group;
          tile.base = at + first * axes[2].stride;
          tile.step = axes[2].stride;
          tile.instances = std::min(group, axes[2].count - first);
          tile.q_begin = first_that_sees(q_begin, q_end, k_begin);
          tile.rows = q_end - tile.q_begin;
          tile.k_begin = k_begin;
          if (tile.rows == 0) { continue; }
          tile.cols = std::min({tiling.k_tile, task.k_rows - k_begin, visible_keys(task, q_end - 1) - k_begin});
          tile.masked = visible_keys(task, tile.q_begin) < k_begin + tile.cols;
          visit(tile);
        }
      }
    }
  }
}

}  // namespace annulus::kernels::cuda
