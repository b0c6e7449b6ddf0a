// SPDX-License-Identifier: Apache-2.0
// The memory that tiles take, on the host alone.
#pragma once

#include <annulus/kernels/cublas.hpp>

#include <cstdint>

namespace annulus::kernels::cuda {

inline constexpr std::int64_t kMostStreams = 8;
/// Largest number of keys in a tile: a row of scores lives in the registers of one warp.
inline constexpr std::int64_t kMostTileKeys = 4096;
// cuBLAS's own recommendation for Hopper; its documentation of cublasSetWorkspace.
inline constexpr std::int64_t kLibraryWorkspaceBytes = std::int64_t{32} << 20;

/// Where the parts of a lane's share of the workspace begin, in bytes from its start. The library's own part comes first.
struct LaneLayout {
  std::int64_t k = 0;  ///< arrays of pointers, one for each instance of a tile
  std::int64_t q = 0;
  std::int64_t v = 0;
  std::int64_t score_rows = 0;
  std::int64_t acc = 0;
  std::int64_t scores = 0;  ///< of the tile in flight
  std::int64_t bytes = 0;   ///< of the whole
};
LaneLayout lane_layout(const CublasTiling& tiling);

/// Floats from one row of scores to the next, in a tile of `cols` keys.
std::int64_t score_row_stride(std::int64_t cols);

/// @throws std::invalid_argument if a number is out of range
void validate(const CublasTiling& tiling);

}  // namespace annulus::kernels::cuda
