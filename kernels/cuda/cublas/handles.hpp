// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "check.hpp"

#include <cuda_runtime_api.h>

#include <memory>
#include <type_traits>

namespace annulus::kernels::cuda {

struct Destroy {
  // As in ~Lane: nobody to tell.
  void operator()(cudaEvent_t event) const noexcept { static_cast<void>(cudaEventDestroy(event)); }
  void operator()(cudaGraph_t graph) const noexcept { static_cast<void>(cudaGraphDestroy(graph)); }
  void operator()(cudaGraphExec_t graph) const noexcept { static_cast<void>(cudaGraphExecDestroy(graph)); }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

inline Owned<cudaEvent_t> make_event() {
  cudaEvent_t event = nullptr;
  ANNULUS_KERNELS_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return Owned<cudaEvent_t>(event);
}

}  // namespace annulus::kernels::cuda
