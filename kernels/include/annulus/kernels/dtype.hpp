// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace annulus {

/// Element type of the problem's tensors. Scores, LSE and running outputs are fp32 whatever this is.
enum class DType { fp32, fp16, bf16 };

/// Bytes of one element.
constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::fp16:
    case DType::bf16:
      return 2;
    case DType::fp32:
      break;
  }
  return 4;
}

namespace kernels {

/// bf16 bits of `value`, rounded to nearest even; NaN stays NaN (quiet), overflow goes to infinity.
constexpr std::uint16_t to_bf16_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) { return static_cast<std::uint16_t>((bits >> 16U) | 0x0040U); }
  const std::uint32_t odd = (bits >> 16U) & 1U;
  return static_cast<std::uint16_t>((bits + 0x7fffU + odd) >> 16U);
}

/// The fp32 value of bf16 bits; exact.
constexpr float from_bf16_bits(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16U); }

/// fp16 (IEEE binary16) bits of `value`, rounded to nearest even, subnormals included; NaN stays NaN (quiet).
constexpr std::uint16_t to_fp16_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16U) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) { return static_cast<std::uint16_t>(sign | 0x7e00U | ((magnitude >> 13U) & 0x3ffU)); }
  if (magnitude >= 0x477ff000U) { return static_cast<std::uint16_t>(sign | 0x7c00U); }  // 65520 and above round to infinity
  if (magnitude < 0x38800000U) {                                                        // below 2^-14: subnormal or zero
    if (magnitude < 0x33000000U) { return static_cast<std::uint16_t>(sign); }           // below 2^-25 rounds to zero
    const std::uint32_t exponent = magnitude >> 23U;
    const std::uint32_t mantissa = (magnitude & 0x7fffffU) | 0x800000U;
    const std::uint32_t shift = 126U - exponent;  // 14 at the largest subnormal exponent (112), 24 at 2^-25
    const std::uint32_t kept = mantissa >> shift;
    const std::uint32_t rest = mantissa & ((1U << shift) - 1U);
    const std::uint32_t half = 1U << (shift - 1U);
    const std::uint32_t up = (rest > half || (rest == half && (kept & 1U) != 0U)) ? 1U : 0U;
    return static_cast<std::uint16_t>(sign | (kept + up));
  }
  const std::uint32_t rebased = magnitude - 0x38000000U;  // exponent bias 127 -> 15
  const std::uint32_t odd = (rebased >> 13U) & 1U;
  return static_cast<std::uint16_t>(sign | ((rebased + 0xfffU + odd) >> 13U));
}

/// The fp32 value of fp16 bits; exact.
constexpr float from_fp16_bits(std::uint16_t half_bits) {
  const std::uint32_t sign = (half_bits & 0x8000U) << 16U;
  const std::uint32_t exponent = (half_bits >> 10U) & 0x1fU;
  const std::uint32_t mantissa = half_bits & 0x3ffU;
  if (exponent == 0x1fU) { return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13U)); }
  if (exponent == 0U) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return sign != 0U ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112U) << 23U) | (mantissa << 13U));
}

/// 16-bit storage types: tags over raw bits, so that a kernel is a template over its element type.
struct Fp16 {
  std::uint16_t bits;
};
struct Bf16 {
  std::uint16_t bits;
};

constexpr float to_float(float value) { return value; }
constexpr float to_float(Fp16 value) { return from_fp16_bits(value.bits); }
constexpr float to_float(Bf16 value) { return from_bf16_bits(value.bits); }

template <class Element>
constexpr Element from_float(float value);
template <>
constexpr float from_float<float>(float value) {
  return value;
}
template <>
constexpr Fp16 from_float<Fp16>(float value) {
  return Fp16{to_fp16_bits(value)};
}
template <>
constexpr Bf16 from_float<Bf16>(float value) {
  return Bf16{to_bf16_bits(value)};
}

/// Calls `body` with a value of the element type of `dtype` as a tag: `with_element(dtype, [&](auto tag) { using E = decltype(tag); ...
/// })`.
template <class Body>
decltype(auto) with_element(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::fp16:
      return body(Fp16{});
    case DType::bf16:
      return body(Bf16{});
    case DType::fp32:
      break;
  }
  return body(float{});
}

}  // namespace kernels
}  // namespace annulus
