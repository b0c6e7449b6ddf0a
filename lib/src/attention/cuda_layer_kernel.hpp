// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/layer_kernel.hpp>

#include <cstdint>
#include <memory>

namespace annulus {

/// Bytes that it takes of the device for cuBLAS.
std::int64_t cuda_layer_kernel_bytes();

/// cuBLAS for the products, and kernels of ours. @throws NotCompiled if this binary lacks CUDA
std::unique_ptr<LayerKernel> make_cuda_layer_kernel(Device& device);

}  // namespace annulus
