// SPDX-License-Identifier: Apache-2.0
#include "gpu_identity.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

#include <annulus/backend/cuda_devices.hpp>
#include <annulus/core/error.hpp>

#include "../backend/cuda_handles.hpp"

namespace annulus {

int device_of(Backend& backend) {
  ANNULUS_EXPECTS(backend.kind() == BackendKind::cuda, "this transport moves memory of backend cuda, found {}", to_string(backend.kind()));
  // The interface names no device, its memory does.
  const Buffer probe = backend.allocate(1, MemoryUse::slot);
  cudaPointerAttributes attributes{};
  ANNULUS_CUDA(cudaPointerGetAttributes(&attributes, probe.get()));
  return attributes.device;
}

std::string gpu_uuid(int device) { return visible_gpus().at(static_cast<std::size_t>(device)).uuid; }

int device_with_uuid(const std::string& uuid) {
  const std::vector<GpuInfo> gpus = visible_gpus();
  const auto found = std::find_if(gpus.begin(), gpus.end(), [&](const GpuInfo& gpu) { return gpu.uuid == uuid; });
  return found == gpus.end() ? -1 : static_cast<int>(found - gpus.begin());
}

}  // namespace annulus
