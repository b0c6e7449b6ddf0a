// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace annulus::kernels::cpu {

/// A run of dependent-free fused multiply-adds in registers, and what it amounts to.
struct FmaLoop {
  double flops_per_iteration;
  /// Runs the loop; the value returned depends on all of it, so that none can be left out.
  float (*run)(std::int64_t iterations);
};

FmaLoop avx2_fma_loop();
FmaLoop avx512_fma_loop();

}  // namespace annulus::kernels::cpu
