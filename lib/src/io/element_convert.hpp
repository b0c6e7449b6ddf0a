// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <cstdint>
#include <optional>

namespace annulus {

/// Converts `count` elements by one rounding to nearest even; `to` and `from` must not overlap unless the types are of one size and the
/// pointers equal. fp16, bf16 -> fp32 is exact.
void convert_elements(DType from_dtype, const void* from, DType to_dtype, void* to, std::int64_t count);

/// Index of the first NaN or infinity among `count` elements, or nothing.
std::optional<std::int64_t> first_non_finite(DType dtype, const void* elements, std::int64_t count);

/// Element `index` as fp32; exact.
float element_at(DType dtype, const void* elements, std::int64_t index);

}  // namespace annulus
