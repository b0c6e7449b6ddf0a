// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/attention_kernel.hpp>

#include <memory>

namespace annulus {

/// Kernel fused for one plan on a Hopper GPU, the backend's.
/// @throws RuntimeFailure if there is not enough memory or CUDA refuses; NotCompiled in a build without CUDA
std::unique_ptr<AttentionKernel> make_fused_kernel(const RingPlan& plan, const TensorAddresses& addresses, Backend& backend);

}  // namespace annulus
