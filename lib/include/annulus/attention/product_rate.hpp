// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>

namespace annulus {

/// FLOPs a second of a plain product on the calling thread's GPU: kernels::cuda::product_rate().
/// @throws NotCompiled, RuntimeFailure
double product_rate(DType dtype);

}  // namespace annulus
