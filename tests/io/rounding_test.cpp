// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/enums.hpp>
#include <annulus/kernels/dtype.hpp>
#include <annulus_test.hpp>

#include "io/element_convert.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using namespace annulus;

/// A 16-bit format, described independently of the conversions under test.
struct Format {
  const char* name;
  int exponent_bits;
  int mantissa_bits;
  std::uint16_t (*narrow)(float);
  float (*widen)(std::uint16_t);

  std::uint16_t infinity() const { return static_cast<std::uint16_t>(((1U << exponent_bits) - 1U) << mantissa_bits); }

  /// Value of finite bits by the definition of IEEE formats, in double.
  double value(std::uint16_t bits) const {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7fff) >> mantissa_bits;
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                           : std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }
};

const std::vector<Format> kFormats{
    {"fp16", 5, 10, kernels::to_fp16_bits, kernels::from_fp16_bits},
    {"bf16", 8, 7, kernels::to_bf16_bits, kernels::from_bf16_bits},
};

}  // namespace

TEST_CASE("every 16-bit value widens to its definition and narrows back to itself", "[io][rounding]") {
  for (const Format& format : kFormats) {
    INFO(format.name);
    int wrong = 0;
    for (std::uint32_t n = 0; n <= 0xffffU; ++n) {
      const auto bits = static_cast<std::uint16_t>(n);
      const float wide = format.widen(bits);
      if ((bits & 0x7fffU) > format.infinity()) {
        const std::uint16_t back = format.narrow(wide);
        wrong += std::isnan(wide) && (back & 0x7fffU) > format.infinity() ? 0 : 1;
        continue;
      }
      if ((bits & 0x7fffU) == format.infinity()) {
        wrong += std::isinf(wide) && std::signbit(wide) == ((bits & 0x8000U) != 0) ? 0 : 1;
      } else {
        wrong += static_cast<double>(wide) == format.value(bits) && std::signbit(wide) == ((bits & 0x8000U) != 0) ? 0 : 1;
      }
      wrong += format.narrow(wide) == bits ? 0 : 1;
    }

    CHECK(wrong == 0);
  }
}

TEST_CASE("midpoints round to even and their fp32 neighbours to the nearer side, up to the overflow boundary", "[io][rounding]") {
  for (const Format& format : kFormats) {
    for (const std::uint32_t sign : {0x0000U, 0x8000U}) {
      INFO(format.name << (sign != 0 ? " negative" : " positive"));
      int wrong = 0;
      for (std::uint32_t n = 0; n < format.infinity(); ++n) {
        const auto lower = static_cast<std::uint16_t>(n | sign);
        const auto upper = static_cast<std::uint16_t>((n + 1) | sign);
        // Past the largest finite value the next one would be 2^(emax+1): rounding to nearest goes by it, and its name is infinity.
        const double upper_value = n + 1 == format.infinity()
                                       ? 2 * format.value(lower) - format.value(static_cast<std::uint16_t>(lower - 1))
                                       : format.value(upper);
        const double exact = (format.value(lower) + upper_value) / 2;
        const auto midpoint = static_cast<float>(exact);
        REQUIRE(static_cast<double>(midpoint) == exact);
        const std::uint16_t even = (n & 1U) == 0 ? lower : upper;
        const float away = std::copysign(std::numeric_limits<float>::infinity(), midpoint);
        wrong += format.narrow(midpoint) == even ? 0 : 1;
        wrong += format.narrow(std::nextafter(midpoint, 0.0F)) == lower ? 0 : 1;
        wrong += format.narrow(std::nextafter(midpoint, away)) == upper ? 0 : 1;
      }

      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("zeros keep their sign, infinities stay, NaN stays NaN, overflow is infinite", "[io][rounding]") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Format& format : kFormats) {
    INFO(format.name);
    CHECK(format.narrow(0.0F) == 0x0000);
    CHECK(format.narrow(-0.0F) == 0x8000);
    CHECK(format.narrow(infinity) == format.infinity());
    CHECK(format.narrow(-infinity) == (format.infinity() | 0x8000));
    CHECK(format.narrow(std::numeric_limits<float>::max()) == format.infinity());
    CHECK(format.narrow(std::numeric_limits<float>::lowest()) == (format.infinity() | 0x8000));
    for (const std::uint32_t bits : {0x7f800001U, 0x7fc00000U, 0x7fffffffU, 0xff800001U, 0xffffffffU}) {
      CHECK((format.narrow(std::bit_cast<float>(bits)) & 0x7fff) > format.infinity());
    }
  }
  CHECK(kernels::to_fp16_bits(65504.0F) == 0x7bff);
  CHECK(kernels::to_fp16_bits(std::nextafter(65520.0F, 0.0F)) == 0x7bff);
  CHECK(kernels::to_fp16_bits(65520.0F) == 0x7c00);
  CHECK(kernels::to_fp16_bits(std::numeric_limits<float>::denorm_min()) == 0x0000);
  CHECK(kernels::to_fp16_bits(0x1p-24F) == 0x0001);
  CHECK(kernels::to_bf16_bits(std::numeric_limits<float>::denorm_min()) == 0x0000);
}

TEST_CASE("first_non_finite finds the first of several, at any place", "[io][rounding]") {
  for (const DType dtype : {DType::fp32, DType::fp16, DType::bf16}) {
    for (const std::int64_t place : {0, 1, 1023, 1024, 1500, 2999}) {
      std::vector<float> wide(3000, 1.0F);
      wide[static_cast<std::size_t>(place)] =
          place % 2 == 0 ? std::numeric_limits<float>::quiet_NaN() : -std::numeric_limits<float>::infinity();
      wide.back() = std::numeric_limits<float>::infinity();
      std::vector<float> elements(3000);
      convert_elements(DType::fp32, wide.data(), dtype, elements.data(), 3000);

      INFO(to_string(dtype));
      CHECK(first_non_finite(dtype, elements.data(), 3000) == place);
      CHECK_FALSE(first_non_finite(dtype, elements.data(), place).has_value());
    }
  }
}
