// SPDX-License-Identifier: Apache-2.0
#include "gemm.hpp"

#include <cblas.h>

#include <string>

namespace annulus::kernels::cpu {

namespace {

/// c = beta c + a b.
bool multiply_into(float beta, std::int64_t rows, std::int64_t cols, std::int64_t depth, const float* a, std::int64_t lda, const float* b,
                   std::int64_t ldb, float* c, std::int64_t ldc) noexcept {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, static_cast<blasint>(rows), static_cast<blasint>(cols),
              static_cast<blasint>(depth), 1.0F, a, static_cast<blasint>(lda), b, static_cast<blasint>(ldb), beta, c,
              static_cast<blasint>(ldc));
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

void prepare_gemm() {
  // The tiles are already spread over threads; OpenBLAS's own would oversubscribe the cores.
  if (openblas_get_num_threads() != 1) { openblas_set_num_threads(1); }
}

std::string describe_gemm() {
  const std::string config = openblas_get_config();  // "OpenBLAS 0.3.21 NO_LAPACKE ..."
  const std::size_t end = config.find(' ', config.find(' ') + 1);
  return config.substr(0, end) + " (" + openblas_get_corename() + ")";
}

}  // namespace annulus::kernels::cpu
