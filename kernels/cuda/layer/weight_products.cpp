// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/cuda_layer.hpp>

#include "check.hpp"
#include "products.hpp"

#include <cstddef>

namespace annulus::kernels::cuda {

struct WeightProducts::Implementation {
  Implementation(void* workspace, CUstream_st* stream) {
    ANNULUS_KERNELS_CHECK(cublasCreate(&handle));
    try {
      ANNULUS_KERNELS_CHECK(cublasSetStream(handle, stream));
      ANNULUS_KERNELS_CHECK(cublasSetWorkspace(handle, workspace, static_cast<std::size_t>(kWorkspaceBytes)));
    } catch (...) {
      static_cast<void>(cublasDestroy(handle));
      throw;
    }
  }
  ~Implementation() { static_cast<void>(cublasDestroy(handle)); }
  Implementation(const Implementation&) = delete;
  Implementation& operator=(const Implementation&) = delete;

  cublasHandle_t handle = nullptr;
};

WeightProducts::WeightProducts(void* workspace, CUstream_st* stream)
    : implementation_(std::make_unique<Implementation>(workspace, stream)) {}
WeightProducts::~WeightProducts() = default;

void WeightProducts::run(const LinearTask& task) {
  if (task.rows == 0) { return; }
  const float one = 1.0F;
  const float zero = 0.0F;
  const int rows = to_int(task.rows);
  const int in = to_int(task.in_features);
  const int out = to_int(task.out_features);
  const Products products = products_of(task.dtype);
  // cuBLAS is column-major: a row-major product is that of the operands in the other order.
  ANNULUS_KERNELS_CHECK(cublasGemmEx(implementation_->handle, CUBLAS_OP_N, CUBLAS_OP_N, out, rows, in, &one, task.weight, products.element,
                                     out, task.in, products.element, in, &zero, task.out, products_of(task.out_dtype).element, out,
                                     products.compute, CUBLAS_GEMM_DEFAULT));
}

}  // namespace annulus::kernels::cuda
