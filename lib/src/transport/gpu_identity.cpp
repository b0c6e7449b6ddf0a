// SPDX-License-Identifier: Apache-2.0
#include "gpu_identity.hpp"

#include <annulus/core/error.hpp>

#include "gpu/cuda_handles.hpp"

namespace annulus {

int device_of(Backend& backend) {
  ANNULUS_EXPECTS(backend.kind() == BackendKind::cuda, "this transport moves memory of backend cuda, found {}", to_string(backend.kind()));
  // The interface names no device, its memory does.
  const Buffer probe = backend.allocate(1, MemoryUse::slot);
  cudaPointerAttributes attributes{};
  ANNULUS_CUDA(cudaPointerGetAttributes(&attributes, probe.get()));
  return attributes.device;
}

}  // namespace annulus
