// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace annulus::kernels::cpu {

/// Vector instruction sets with code of their own, narrowest first.
enum class Isa { none, avx2, avx512 };

/// The widest instruction set that this CPU and operating system have; found once.
Isa detected_isa();

}  // namespace annulus::kernels::cpu
