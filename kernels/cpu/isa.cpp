// SPDX-License-Identifier: Apache-2.0
#include "isa.hpp"

#include <annulus/kernels/cpu.hpp>

namespace annulus::kernels::cpu {

Isa detected_isa() {
  static const Isa isa = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) { return Isa::avx512; }
    return avx2 ? Isa::avx2 : Isa::none;
  }();
  return isa;
}

bool supported() { return detected_isa() != Isa::none; }

}  // namespace annulus::kernels::cpu
