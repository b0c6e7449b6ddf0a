// SPDX-License-Identifier: Apache-2.0
// The bodies of TileOps over a vector type `Vector`, included once by the source file of each instruction set.
//
// Everything here has internal linkage and calls nothing inline from elsewhere: a shared inline function compiled here would carry this
// file's instructions, and the linker may keep that copy for the whole program.
#pragma once

#include <annulus/kernels/cpu.hpp>

#include "tile_ops.hpp"

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace annulus::kernels::cpu {
namespace {

// exp(x) for x <= 0: x = k ln2 + r, exp(r) = 1 + r + r^2 P(r) with P minimax on |r| <= ln2 / 2 (relative error 2^-26; exp(0) is exactly 1).
// One fp32 ln2 is enough: its own error, 1.9e-9 k, reaches half an ulp only where exp(x) is below 2^-30.
constexpr float kLog2E = 0x1.715476p+0F;
constexpr float kLn2 = 0x1.62e430p-1F;
constexpr float kRoundingShift = 0x1.8p23F;  // adding it leaves the nearest integer in the low mantissa bits
constexpr float kExpC2 = 0x1.000000p-1F;
constexpr float kExpC3 = 0x1.5554acp-3F;
constexpr float kExpC4 = 0x1.5553dep-5F;
constexpr float kExpC5 = 0x1.122920p-7F;
constexpr float kExpC6 = 0x1.6ecaa6p-10F;
constexpr float kExpSmallest = -87.0F;  // below, 2^k would leave the normal numbers: exp is taken as 0

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

__m256 widen(const float* src) { return _mm256_loadu_ps(src); }
__m256 widen(const Fp16* src) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))); }
__m256 widen(const Bf16* src) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/// dst [padded] <- src [head_dim] widened, zeros behind it; padded a multiple of 8.
template <class Element>
void widen_row(const Element* src, std::int64_t head_dim, float* dst, std::int64_t padded) {
  std::int64_t d = 0;
  for (; d + 8 <= head_dim; d += 8) { _mm256_store_ps(dst + d, widen(src + d)); }
  if (d < head_dim) {
    Element tail[8] = {};
    std::memcpy(tail, src + d, static_cast<std::size_t>(head_dim - d) * sizeof(Element));
    _mm256_store_ps(dst + d, widen(tail));
    d += 8;
  }
  for (; d < padded; d += 8) { _mm256_store_ps(dst + d, _mm256_setzero_ps()); }
}

template <class Element>
void pack_rows(const void* src, std::int64_t row_stride, std::int64_t rows, std::int64_t head_dim, float* dst, std::int64_t ld) {
  const auto* from = static_cast<const Element*>(src);
  for (std::int64_t row = 0; row < rows; ++row) { widen_row(from + row * row_stride, head_dim, dst + row * ld, ld); }
}

/// dst [8, dst_ld] = transpose of src [8, src_ld].
void transpose_8x8(const float* src, std::int64_t src_ld, float* dst, std::int64_t dst_ld) {
  __m256 pair[8];
  for (int i = 0; i < 8; i += 2) {
    const __m256 upper = _mm256_load_ps(src + i * src_ld);
    const __m256 lower = _mm256_load_ps(src + (i + 1) * src_ld);
    pair[i] = _mm256_unpacklo_ps(upper, lower);
    pair[i + 1] = _mm256_unpackhi_ps(upper, lower);
  }
  __m256 quad[8];
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_store_ps(dst + i * dst_ld, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_store_ps(dst + (i + 4) * dst_ld, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}

template <class Element>
void pack_transposed(const void* src, std::int64_t row_stride, std::int64_t rows, std::int64_t head_dim, float* dst, std::int64_t ld) {
  const auto* from = static_cast<const Element*>(src);
  alignas(64) float block[8 * kLargestHeadDim];
  const std::int64_t padded = (head_dim + kPadding - 1) / kPadding * kPadding;
  for (std::int64_t first = 0; first < rows; first += kPadding) {
    for (std::int64_t half = first; half < first + kPadding; half += 8) {
      for (std::int64_t i = 0; i < 8; ++i) {
        const bool exists = half + i < rows;
        widen_row(exists ? from + (half + i) * row_stride : nullptr, exists ? head_dim : 0, block + i * padded, padded);
      }
      for (std::int64_t d = 0; d < padded; d += 8) { transpose_8x8(block + d, padded, dst + d * ld + half, ld); }
    }
  }
}

template <class Vector>
void softmax(float* scores, std::int64_t ld, std::int64_t rows, const std::int32_t* visible, std::int64_t depth, float* max, float* sum,
             float* alpha) {
  using Register = typename Vector::Register;
  constexpr std::int64_t kWidth = Vector::kWidth;
  for (std::int64_t row = 0; row < rows; ++row) {
    float* p = scores + row * ld;
    const std::int64_t count = visible[row];
    const std::int64_t whole = count / kWidth * kWidth;
    const int rest = static_cast<int>(count - whole);
    alpha[row] = 1.0F;
    std::int64_t done = 0;
    if (count > 0) {
      // The new maximum. A NaN score may or may not survive here; its probability and thus the sum is NaN either way.
      Register lanes[4] = {Vector::set(kNegativeInfinity), Vector::set(kNegativeInfinity), Vector::set(kNegativeInfinity),
                           Vector::set(kNegativeInfinity)};
      std::int64_t j = 0;
      for (; j + 4 * kWidth <= whole; j += 4 * kWidth) {
        for (int i = 0; i < 4; ++i) { lanes[i] = Vector::max(lanes[i], Vector::load(p + j + i * kWidth)); }
      }
      for (; j < whole; j += kWidth) { lanes[0] = Vector::max(lanes[0], Vector::load(p + j)); }
      if (rest > 0) { lanes[1] = Vector::max(lanes[1], Vector::first(rest, Vector::load(p + whole), Vector::set(kNegativeInfinity))); }
      const float tile_max = Vector::reduce_max(Vector::max(Vector::max(lanes[0], lanes[1]), Vector::max(lanes[2], lanes[3])));
      if (tile_max > max[row]) {
        alpha[row] = Vector::lowest(Vector::exp(Vector::set(max[row] - tile_max)));
        max[row] = tile_max;
      }
      // Every score so far may be -inf: subtracting 0 then gives probability 0 instead of NaN.
      const Register base = Vector::set(max[row] == kNegativeInfinity ? 0.0F : max[row]);

      Register sums[2] = {Vector::set(0.0F), Vector::set(0.0F)};
      for (j = 0; j + 2 * kWidth <= whole; j += 2 * kWidth) {
        const Register even = Vector::exp(Vector::sub(Vector::load(p + j), base));
        const Register odd = Vector::exp(Vector::sub(Vector::load(p + j + kWidth), base));
        Vector::store(p + j, even);
        Vector::store(p + j + kWidth, odd);
        sums[0] = Vector::add(sums[0], even);
        sums[1] = Vector::add(sums[1], odd);
      }
      if (j < whole) {
        const Register value = Vector::exp(Vector::sub(Vector::load(p + j), base));
        Vector::store(p + j, value);
        sums[0] = Vector::add(sums[0], value);
      }
      done = whole;
      if (rest > 0) {
        const Register value = Vector::exp(Vector::sub(Vector::load(p + whole), base));
        const Register kept = Vector::first(rest, value, Vector::set(0.0F));
        Vector::store(p + whole, kept);
        sums[1] = Vector::add(sums[1], kept);
        done += kWidth;
      }
      sum[row] = sum[row] * alpha[row] + Vector::reduce_add(Vector::add(sums[0], sums[1]));
    }
    for (; done < depth; done += kWidth) { Vector::store(p + done, Vector::set(0.0F)); }
  }
}

template <class Vector>
void accumulate(float* acc, const float* product, const float* alpha, std::int64_t rows, std::int64_t ld) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto factor = Vector::set(alpha[row]);
    for (std::int64_t d = row * ld; d < (row + 1) * ld; d += Vector::kWidth) {
      Vector::store(acc + d, Vector::fma(Vector::load(acc + d), factor, Vector::load(product + d)));
    }
  }
}

template <class Vector>
void differentiate(float* scores, float* products, std::int64_t ld, std::int64_t keys, std::int64_t queries, const float* max,
                   const float* sum, float scale) {
  const auto factor = Vector::set(scale);
  const auto zero = Vector::set(0.0F);
  for (std::int64_t key = 0; key < keys; ++key) {
    float* p = scores + key * ld;
    float* ds = products + key * ld;
    for (std::int64_t j = 0; j < queries; j += Vector::kWidth) {
      const auto probability = Vector::exp(Vector::sub(Vector::load(p + j), Vector::load(max + j)));
      const auto scaled = Vector::fma(probability, factor, zero);
      Vector::store(p + j, probability);
      Vector::store(ds + j, Vector::fma(scaled, Vector::sub(Vector::load(ds + j), Vector::load(sum + j)), zero));
    }
  }
}

template <class Vector>
bool all_finite(const float* values, std::int64_t count) {
  // 0 * x is 0 for finite x and NaN otherwise; NaN stays in the sum.
  auto sum = Vector::set(0.0F);
  for (std::int64_t i = 0; i < count; i += Vector::kWidth) { sum = Vector::fma(Vector::load(values + i), Vector::set(0.0F), sum); }
  return Vector::reduce_add(sum) == 0.0F;
}

template <class Vector>
constexpr TileOps kTileOps{Vector::kName,
                           {pack_rows<float>, pack_rows<Fp16>, pack_rows<Bf16>},
                           {pack_transposed<float>, pack_transposed<Fp16>, pack_transposed<Bf16>},
                           softmax<Vector>,
                           accumulate<Vector>,
                           differentiate<Vector>,
                           all_finite<Vector>};

}  // namespace
}  // namespace annulus::kernels::cpu
