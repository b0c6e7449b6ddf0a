// SPDX-License-Identifier: Apache-2.0
// The seam to the library that multiplies tiles; one source file per library, chosen at configure time.
#pragma once

#include <cstdint>
#include <string>

namespace annulus::kernels::cpu {

/// c [rows, cols] = a [rows, depth] * b [depth, cols], row-major fp32 with leading dimensions lda, ldb, ldc; on the calling thread.
///
/// c must not alias a or b. May be called from several threads at once after prepare_gemm().
/// Returns false, with c untouched, if the library has no code for this shape.
bool multiply(std::int64_t rows, std::int64_t cols, std::int64_t depth, const float* a, std::int64_t lda, const float* b, std::int64_t ldb,
              float* c, std::int64_t ldc) noexcept;

/// The same, with the product added to c.
bool multiply_add(std::int64_t rows, std::int64_t cols, std::int64_t depth, const float* a, std::int64_t lda, const float* b,
                  std::int64_t ldb, float* c, std::int64_t ldc) noexcept;

/// Puts the library into the state that multiply() needs; cheap when it already is.
void prepare_gemm();

/// The library, its version and the code it chose for this CPU.
std::string describe_gemm();

}  // namespace annulus::kernels::cpu
