// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <cstddef>
#include <cstdint>

namespace annulus {

/// The value of the dtype that is nearest, as fp32.
inline float round_to(DType dtype, float value) {
  return kernels::with_element(dtype, [&](auto tag) { return kernels::to_float(kernels::from_float<decltype(tag)>(value)); });
}

/// Elements of the dtype as fp32, which holds each of them.
inline void widen(DType dtype, const std::byte* src, std::int64_t count, float* dst) {
  kernels::with_element(dtype, [&](auto tag) {
    using Element = decltype(tag);
    const auto* elements = reinterpret_cast<const Element*>(src);
    for (std::int64_t i = 0; i < count; ++i) { dst[i] = kernels::to_float(elements[i]); }
  });
}

}  // namespace annulus
