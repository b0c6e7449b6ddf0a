// SPDX-License-Identifier: Apache-2.0
#include "fma_peak.hpp"

#include <immintrin.h>

namespace annulus::kernels::cpu {
namespace {

constexpr int kWidth = 16;
constexpr int kAccumulators = 16;  // more than latency (4-5 cycles) x pipes (2), and with two operands they fit the registers

float run(std::int64_t iterations) {
  __m512 accumulators[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) { accumulators[i] = _mm512_set1_ps(static_cast<float>(i)); }
  const __m512 factor = _mm512_set1_ps(0.5F);
  const __m512 addend = _mm512_set1_ps(1.0F);
  for (std::int64_t iteration = 0; iteration < iterations; ++iteration) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) { accumulators[i] = _mm512_fmadd_ps(accumulators[i], factor, addend); }
  }
  __m512 total = accumulators[0];
#pragma GCC unroll 16
  for (int i = 1; i < kAccumulators; ++i) { total = _mm512_add_ps(total, accumulators[i]); }
  return _mm512_cvtss_f32(total);
}

}  // namespace

FmaLoop avx512_fma_loop() { return {2.0 * kWidth * kAccumulators, run}; }

}  // namespace annulus::kernels::cpu
