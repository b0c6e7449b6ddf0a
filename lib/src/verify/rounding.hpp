// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/dtype.hpp>

namespace annulus {

/// The value of the dtype that is nearest, as fp32.
inline float round_to(DType dtype, float value) {
  return kernels::with_element(dtype, [&](auto tag) { return kernels::to_float(kernels::from_float<decltype(tag)>(value)); });
}

}  // namespace annulus
