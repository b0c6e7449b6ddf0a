// SPDX-License-Identifier: Apache-2.0
#include "gemm.hpp"

#include <libxsmm.h>

#include <string>

namespace annulus::kernels::cpu {

namespace {

/// c = beta c + a b, beta 0 or 1.
bool multiply_into(float beta, std::int64_t rows, std::int64_t cols, std::int64_t depth, const float* a, std::int64_t lda, const float* b,
                   std::int64_t ldb, float* c, std::int64_t ldc) noexcept {
  // LIBXSMM is column-major: a row-major product is the product of the operands in the other order. Its dispatch is a look-up after the
  // first call with a shape.
  const auto lead_a = static_cast<libxsmm_blasint>(ldb);
  const auto lead_b = static_cast<libxsmm_blasint>(lda);
  const auto lead_c = static_cast<libxsmm_blasint>(ldc);
  const float alpha = 1.0F;
  const int flags = LIBXSMM_GEMM_FLAG_NONE;
  const int prefetch = LIBXSMM_GEMM_PREFETCH_NONE;
  const libxsmm_smmfunction product =
      libxsmm_smmdispatch(static_cast<libxsmm_blasint>(cols), static_cast<libxsmm_blasint>(rows), static_cast<libxsmm_blasint>(depth),
                          &lead_a, &lead_b, &lead_c, &alpha, &beta, &flags, &prefetch);
  if (product == nullptr) { return false; }
  product(b, a, c);
  return true;
}

}  // namespace

bool multiply(std::int64_t rows, std::int64_t cols, std::int64_t depth, const float* a, std::int64_t lda, const float* b, std::int64_t ldb,
              float* c, std::int64_t ldc) noexcept {
  return multiply_into(0.0F, rows, cols, depth, a, lda, b, ldb, c, ldc);
}

bool multiply_add(std::int64_t rows, std::int64_t cols, std::int64_t depth, const float* a, std::int64_t lda, const float* b,
                  std::int64_t ldb, float* c, std::int64_t ldc) noexcept {
  return multiply_into(1.0F, rows, cols, depth, a, lda, b, ldb, c, ldc);
}

void prepare_gemm() { libxsmm_init(); }

std::string describe_gemm() {
  libxsmm_init();
  return "LIBXSMM " + std::to_string(LIBXSMM_VERSION_MAJOR) + "." + std::to_string(LIBXSMM_VERSION_MINOR) + " (" +
         libxsmm_get_target_arch() + ")";
}

}  // namespace annulus::kernels::cpu
