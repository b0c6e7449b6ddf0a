// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gradient_scores.hpp"

namespace annulus::kernels::cuda {

/// Keys of the tile that a row sees.
__device__ __forceinline__ int visible_of(const GradientScores& tile, int row) {
  if (!tile.causal) { return tile.cols; }
  const std::int64_t ahead = tile.lead + row * tile.q_stride;
  if (ahead < 0) { return 0; }
  const std::int64_t keys = ahead / tile.k_stride + 1;
  return keys < tile.cols ? static_cast<int>(keys) : tile.cols;
}

}  // namespace annulus::kernels::cuda
