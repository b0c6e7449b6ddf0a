// SPDX-License-Identifier: Apache-2.0
#include "element_convert.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>

namespace annulus {

namespace {

constexpr bool is_non_finite(float value) { return (std::bit_cast<std::uint32_t>(value) & 0x7f800000U) == 0x7f800000U; }
constexpr bool is_non_finite(kernels::Fp16 value) { return (value.bits & 0x7c00U) == 0x7c00U; }
constexpr bool is_non_finite(kernels::Bf16 value) { return (value.bits & 0x7f80U) == 0x7f80U; }

template <class Element>
std::optional<std::int64_t> first_non_finite_of(const Element* elements, std::int64_t count) {
  // The blocks have no early exit, so that the usual case (all finite) is a vector loop.
  constexpr std::int64_t kBlock = 1024;
  for (std::int64_t block = 0; block < count; block += kBlock) {
    const std::int64_t end = std::min(count, block + kBlock);
    int found = 0;
    for (std::int64_t i = block; i < end; ++i) { found |= is_non_finite(elements[i]) ? 1 : 0; }
    if (found == 0) { continue; }
    for (std::int64_t i = block; i < end; ++i) {
      if (is_non_finite(elements[i])) { return i; }
    }
  }
  return std::nullopt;
}

}  // namespace

void convert_elements(DType from_dtype, const void* from, DType to_dtype, void* to, std::int64_t count) {
  if (from_dtype == to_dtype) {
    if (from != to) { std::memcpy(to, from, static_cast<std::size_t>(count * size_of(to_dtype))); }
    return;
  }
  kernels::with_element(from_dtype, [&](auto from_tag) {
    kernels::with_element(to_dtype, [&](auto to_tag) {
      using From = decltype(from_tag);
      using To = decltype(to_tag);
      const auto* source = static_cast<const From*>(from);
      auto* target = static_cast<To*>(to);
      for (std::int64_t i = 0; i < count; ++i) { target[i] = kernels::from_float<To>(kernels::to_float(source[i])); }
    });
  });
}

std::optional<std::int64_t> first_non_finite(DType dtype, const void* elements, std::int64_t count) {
  return kernels::with_element(dtype, [&](auto tag) { return first_non_finite_of(static_cast<const decltype(tag)*>(elements), count); });
}

float element_at(DType dtype, const void* elements, std::int64_t index) {
  return kernels::with_element(dtype, [&](auto tag) {
    std::memcpy(&tag, static_cast<const std::byte*>(elements) + index * size_of(dtype), sizeof tag);
    return kernels::to_float(tag);
  });
}

}  // namespace annulus
