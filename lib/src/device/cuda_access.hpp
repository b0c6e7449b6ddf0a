// SPDX-License-Identifier: Apache-2.0
// What lies under the seam of a CUDA device, for code that is CUDA itself: transports between GPUs, attention kernels.
#pragma once

#include <annulus/core/error.hpp>
#include <annulus/device/device.hpp>
#include <annulus/kernels/cuda.hpp>

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace annulus {

/// The number of the GPU that a device is.
/// @throws InvalidArgument for the host
int device_of(const Device& device);

/// The stream under a queue of a GPU.
/// @throws AssertionFailure for a queue of the host
cudaStream_t stream_of(Queue& queue);

/// Calls `body`; what the kernels throw becomes this library's errors.
template <class Body>
void translated(Body&& body) {
  try {
    body();
  } catch (const kernels::cuda::LibraryError& error) { throw RuntimeFailure(error.what()); } catch (const std::invalid_argument& error) {
    throw InvalidArgument(error.what());
  }
}

}  // namespace annulus
