// SPDX-License-Identifier: Apache-2.0
// Linked instead of cuda_device.cpp in a build without CUDA.
#include <annulus/core/error.hpp>
#include <annulus/device/cuda_device.hpp>

namespace annulus {

std::unique_ptr<Device> make_cuda_device(const DeviceOptions& /*options*/) {
  throw NotCompiled("backend cuda is not compiled into this binary; it has: reference, cpu");
}

}  // namespace annulus
