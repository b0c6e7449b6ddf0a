// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/attention_kernel.hpp>

#include <memory>

namespace annulus {

/// Kernel fused on a Hopper GPU.
/// @throws NotCompiled in a build without CUDA
std::unique_ptr<AttentionKernel> make_fused_kernel(Device& device);

}  // namespace annulus
