// SPDX-License-Identifier: Apache-2.0
// fp64 to the dtypes by one rounding.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <bit>
#include <cmath>
#include <cstdint>

namespace annulus::kernels::reference {

/// `value` rounded to an odd fp32 mantissa unless exact: rounding that to 16 bits rounds `value` itself once, to nearest even.
/// Source: Boldo & Melquiond 2008, emulation of correct rounding through round-to-odd.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || std::isnan(value)) { return nearest; }
  const bool too_large = std::abs(static_cast<double>(nearest)) > std::abs(value);
  const float truncated = too_large ? std::nextafter(nearest, 0.0F) : nearest;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(truncated) | 1U);
}

/// An element of a tensor in fp64, which holds each of every dtype.
template <class Element>
double at(const void* elements, std::int64_t index) {
  return static_cast<double>(to_float(static_cast<const Element*>(elements)[index]));
}

template <class Element>
Element narrow(double value) {
  return from_float<Element>(round_to_odd(value));
}
template <>
inline float narrow<float>(double value) {
  return static_cast<float>(value);
}

}  // namespace annulus::kernels::reference
