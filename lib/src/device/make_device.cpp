// SPDX-License-Identifier: Apache-2.0
#include <annulus/device/cuda_device.hpp>
#include <annulus/device/device.hpp>

#include "host_device.hpp"

namespace annulus {

std::unique_ptr<Device> make_device(const DeviceOptions& options) {
  switch (options.kind) {
    case BackendKind::cuda:
      return make_cuda_device(options);
    case BackendKind::reference:
    case BackendKind::cpu:
      break;
  }
  return std::make_unique<HostDevice>(options.kind, options.threads);
}

}  // namespace annulus
