// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/cublas.hpp>

#include "tile.hpp"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstddef>

namespace annulus::kernels::cuda {

/// A stream with all that a tile in flight on it needs.
class Lane {
 public:
  Lane();
  Lane(Lane&& other) noexcept;
  Lane& operator=(Lane&&) = delete;
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  ~Lane() { destroy(); }

  /// Cuts up `memory`, lane_layout(tiling).bytes long, for the tiles to come.
  void use_memory(std::byte* memory, const CublasTiling& tiling);
  /// The first kLibraryWorkspaceBytes of `memory` are the library's. In place of use_memory(), where tiles need nothing else.
  void use_library_workspace(std::byte* memory);
  /// The next use_memory() tells the library anew, even if memory comes to lie at the same place.
  void forget_memory() { memory_ = nullptr; }

  cudaStream_t stream() const { return stream_; }
  cudaEvent_t event() const { return event_; }
  cublasHandle_t handle() const { return handle_; }
  float* scores() const { return scores_; }
  const TilePointers& pointers() const { return pointers_; }

 private:
  void destroy() noexcept;

  cudaStream_t stream_ = nullptr;
  cudaEvent_t event_ = nullptr;
  cublasHandle_t handle_ = nullptr;
  std::byte* memory_ = nullptr;
  CublasTiling tiling_;
  float* scores_ = nullptr;
  TilePointers pointers_;
};

}  // namespace annulus::kernels::cuda
