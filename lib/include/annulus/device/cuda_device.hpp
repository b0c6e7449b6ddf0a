// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/device/device.hpp>

#include <memory>

namespace annulus {

/// GPU options.number.
///
/// Tensors come from one stream-ordered pool of that device, which keeps what is freed; slots from plain cudaMalloc. Memory may be used on
/// any queue at once after allocate(), and is reused only once all queues have passed their present ends. It is used by one host
/// thread at a time. The calling thread's current CUDA device is options.number from then on. upload() and download() are asynchronous for
/// the caller only from pinned memory; from pageable memory they may block.
/// @throws NotCompiled in a build without CUDA
/// @throws InvalidArgument if there is no driver, no GPU, no such device, or no machine code for it in this binary
/// @throws RuntimeFailure if CUDA fails
std::unique_ptr<Device> make_cuda_device(const DeviceOptions& options);

}  // namespace annulus
