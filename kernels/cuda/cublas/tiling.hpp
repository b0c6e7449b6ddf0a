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

std::int64_t pointer_array_bytes(const CublasTiling& tiling);
/// Of the workspace, what a lane takes.
std::int64_t lane_bytes(const CublasTiling& tiling);

/// @throws std::invalid_argument if a number is out of range
void validate(const CublasTiling& tiling);

}  // namespace annulus::kernels::cuda
