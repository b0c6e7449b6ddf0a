// SPDX-License-Identifier: Apache-2.0
#include "lane.hpp"

#include "check.hpp"
#include "tiling.hpp"

#include <utility>

namespace annulus::kernels::cuda {

Lane::Lane() {
  try {
    ANNULUS_KERNELS_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    ANNULUS_KERNELS_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    ANNULUS_KERNELS_CHECK(cublasCreate(&handle_));
    ANNULUS_KERNELS_CHECK(cublasSetStream(handle_, stream_));
  } catch (...) {
    destroy();
    throw;
  }
}

Lane::Lane(Lane&& other) noexcept
    : stream_(std::exchange(other.stream_, nullptr)),
      event_(std::exchange(other.event_, nullptr)),
      handle_(std::exchange(other.handle_, nullptr)),
      memory_(std::exchange(other.memory_, nullptr)),
      tiling_(other.tiling_),
      scores_(std::exchange(other.scores_, nullptr)),
      pointers_(std::exchange(other.pointers_, {})) {}

void Lane::use_memory(std::byte* memory, const CublasTiling& tiling) {
  if (memory == memory_ && tiling == tiling_) { return; }
  ANNULUS_KERNELS_CHECK(cublasSetWorkspace(handle_, memory, static_cast<std::size_t>(kLibraryWorkspaceBytes)));
  const LaneLayout layout = lane_layout(tiling);
  pointers_.k = reinterpret_cast<const void**>(memory + layout.k);
  pointers_.q = reinterpret_cast<const void**>(memory + layout.q);
  pointers_.v = reinterpret_cast<const void**>(memory + layout.v);
  pointers_.scores = reinterpret_cast<void**>(memory + layout.score_rows);
  pointers_.acc = reinterpret_cast<void**>(memory + layout.acc);
  scores_ = reinterpret_cast<float*>(memory + layout.scores);
  memory_ = memory;
  tiling_ = tiling;
}

void Lane::use_library_workspace(std::byte* memory) {
  if (memory == memory_) { return; }
  ANNULUS_KERNELS_CHECK(cublasSetWorkspace(handle_, memory, static_cast<std::size_t>(kLibraryWorkspaceBytes)));
  memory_ = memory;
}

void Lane::destroy() noexcept {
  // Failures here have nobody to tell: the work they belong to has been checked when it was enqueued.
  if (handle_ != nullptr) { static_cast<void>(cublasDestroy(handle_)); }
  if (event_ != nullptr) { static_cast<void>(cudaEventDestroy(event_)); }
  if (stream_ != nullptr) { static_cast<void>(cudaStreamDestroy(stream_)); }
}

}  // namespace annulus::kernels::cuda
