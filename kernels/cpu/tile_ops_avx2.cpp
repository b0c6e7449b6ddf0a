// SPDX-License-Identifier: Apache-2.0
#include "tile_ops_body.hpp"

namespace annulus::kernels::cpu {
namespace {

struct Avx2 {
  using Register = __m256;
  static constexpr std::int64_t kWidth = 8;
  static constexpr const char* kName = "AVX2";

  static Register set(float value) { return _mm256_set1_ps(value); }
  static Register load(const float* src) { return _mm256_load_ps(src); }
  static void store(float* dst, Register value) { _mm256_store_ps(dst, value); }
  static Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static Register sub(Register a, Register b) { return _mm256_sub_ps(a, b); }
  static Register max(Register a, Register b) { return _mm256_max_ps(a, b); }
  static Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static float lowest(Register value) { return _mm256_cvtss_f32(value); }

  /// Lanes below `count` of `value`, the others of `other`.
  static Register first(int count, Register value, Register other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
    return _mm256_blendv_ps(other, value, _mm256_castsi256_ps(keep));
  }
  static float reduce_max(Register value) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static float reduce_add(Register value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static Register exp(Register x) {
    const Register shifted = fma(x, set(kLog2E), set(kRoundingShift));
    const Register k = sub(shifted, set(kRoundingShift));
    const Register r = _mm256_fnmadd_ps(k, set(kLn2), x);
    Register p = fma(set(kExpC6), r, set(kExpC5));
    p = fma(p, r, set(kExpC4));
    p = fma(p, r, set(kExpC3));
    p = fma(p, r, set(kExpC2));
    p = fma(p, r, set(1.0F));
    p = fma(p, r, set(1.0F));
    // 2^k from the integer in shifted's low bits; multiplying, unlike adding to p's exponent, keeps NaN.
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const Register power = _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(set(1.0F))));
    const Register vanishes = _mm256_cmp_ps(x, set(kExpSmallest), _CMP_LT_OQ);
    return _mm256_andnot_ps(vanishes, _mm256_mul_ps(p, power));
  }
};

}  // namespace

const TileOps& avx2_tile_ops() { return kTileOps<Avx2>; }

}  // namespace annulus::kernels::cpu
