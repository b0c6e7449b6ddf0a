// SPDX-License-Identifier: Apache-2.0
#include "tile_ops_body.hpp"

namespace annulus::kernels::cpu {
namespace {

struct Avx512 {
  using Register = __m512;
  static constexpr std::int64_t kWidth = 16;
  static constexpr const char* kName = "AVX-512";

  static Register set(float value) { return _mm512_set1_ps(value); }
  static Register load(const float* src) { return _mm512_load_ps(src); }
  static void store(float* dst, Register value) { _mm512_store_ps(dst, value); }
  static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static Register sub(Register a, Register b) { return _mm512_sub_ps(a, b); }
  static Register max(Register a, Register b) { return _mm512_max_ps(a, b); }
  static Register fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
  static float lowest(Register value) { return _mm512_cvtss_f32(value); }

  /// Lanes below `count` of `value`, the others of `other`.
  static Register first(int count, Register value, Register other) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>((1U << static_cast<unsigned>(count)) - 1U), other, value);
  }
  static float reduce_max(Register value) { return _mm512_reduce_max_ps(value); }
  static float reduce_add(Register value) { return _mm512_reduce_add_ps(value); }
  static Register exp(Register x) {
    const Register shifted = fma(x, set(kLog2E), set(kRoundingShift));
    const Register k = sub(shifted, set(kRoundingShift));
    const Register r = _mm512_fnmadd_ps(k, set(kLn2), x);
    Register p = fma(set(kExpC6), r, set(kExpC5));
    p = fma(p, r, set(kExpC4));
    p = fma(p, r, set(kExpC3));
    p = fma(p, r, set(kExpC2));
    p = fma(p, r, set(1.0F));
    p = fma(p, r, set(1.0F));
    // Not-less-than keeps NaN, and zeroes the rest.
    const __mmask16 kept = _mm512_cmp_ps_mask(x, set(kExpSmallest), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(kept, p, k);
  }
};

}  // namespace

const TileOps& avx512_tile_ops() { return kTileOps<Avx512>; }

}  // namespace annulus::kernels::cpu
