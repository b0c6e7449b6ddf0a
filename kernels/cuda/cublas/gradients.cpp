// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/cublas.hpp>

#include "chains.hpp"
#include "check.hpp"
#include "gradient_scores.hpp"
#include "gradient_tiles.hpp"
#include "products.hpp"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

namespace annulus::kernels::cuda {
namespace {

void multiply(cublasHandle_t handle, DType dtype, const GradientProduct& product) {
  const Products products = products_of(dtype);
  const auto operation = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  ANNULUS_KERNELS_CHECK(cublasGemmStridedBatchedEx_64(
      handle, operation(product.a_transposed), operation(product.b_transposed), product.m, product.n, product.k, &product.alpha, product.a,
      products.element, product.lda, product.stride_a, product.b, products.element, product.ldb, product.stride_b, &product.beta, product.c,
      CUDA_R_32F, product.ldc, product.stride_c, product.batches, products.compute, CUBLAS_GEMM_DEFAULT));
}

GradientScores scores_of(const GradientTask& task, const GradientTile& tile, const GradientScratch& scratch) {
  const AttendTask& at = task.attend;
  const std::int64_t stat = tile.base.stat + tile.q_begin * at.stat_strides.row;
  GradientScores scores;
  scores.scores = scratch.scores;
  scores.products = scratch.products;
  scores.ld = scratch.ld;
  scores.instance_stride = scratch.instance_stride;
  scores.instances = to_int(tile.instances);
  scores.rows = to_int(tile.rows);
  scores.cols = to_int(tile.cols);
  scores.max = static_cast<const float*>(at.max) + stat;
  scores.sum = static_cast<const float*>(at.sum) + stat;
  scores.stat_row_stride = at.stat_strides.row;
  scores.stat_instance_stride = tile.step.stat;
  scores.scale = static_cast<float>(at.scale);
  scores.causal = tile.masked;
  scores.lead = at.q_positions.first + tile.q_begin * at.q_positions.stride - at.k_positions.first - tile.k_begin * at.k_positions.stride;
  scores.q_stride = at.q_positions.stride;
  scores.k_stride = at.k_positions.stride;
  return scores;
}

}  // namespace

CublasGradients::CublasGradients() {
  cublasHandle_t handle = nullptr;
  ANNULUS_KERNELS_CHECK(cublasCreate(&handle));
  handle_ = handle;
}

CublasGradients::~CublasGradients() {
  // Destroying a handle waits for the device, whose peers may be gone.
  if (std::uncaught_exceptions() > exceptions_at_start_) { return; }
  static_cast<void>(cublasDestroy(handle_));
}

std::int64_t CublasGradients::workspace_bytes(const CublasTiling& tiling) {
  return kLibraryWorkspaceBytes + gradient_scratch_bytes(tiling);
}

void CublasGradients::differentiate(const GradientTask& task, const CublasTiling& tiling, void* workspace, std::int64_t bytes,
                                    CUstream_st* stream) {
  validate(tiling);
  validate(task.attend);
  require(bytes >= workspace_bytes(tiling), "CublasGradients: the workspace is too small for the tiling");
  ANNULUS_KERNELS_CHECK(cublasSetStream(handle_, stream));
  // Setting the stream takes the workspace away.
  ANNULUS_KERNELS_CHECK(cublasSetWorkspace(handle_, workspace, static_cast<std::size_t>(kLibraryWorkspaceBytes)));
  std::byte* const scratch_memory = static_cast<std::byte*>(workspace) + kLibraryWorkspaceBytes;
  for_each_gradient_tile(task.attend, tiling, [&](const GradientTile& tile) {
    const GradientScratch scratch = gradient_scratch(tiling, tile, scratch_memory);
    for (const GradientProduct& product : score_products(task, tile, scratch)) { multiply(handle_, task.attend.dtype, product); }
    differentiate_scores(task.attend.dtype, scores_of(task, tile, scratch), stream);
    for (const GradientProduct& product : gradient_products(task, tile, scratch)) { multiply(handle_, task.attend.dtype, product); }
  });
}

}  // namespace annulus::kernels::cuda
