// SPDX-License-Identifier: Apache-2.0
// What cuBLAS is told of products of a dtype, of attention as of a layer.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <cublas_v2.h>

namespace annulus::kernels::cuda {

/// Type of the operands, and mode.
struct Products {
  cudaDataType_t element;
  cublasComputeType_t compute;
};

inline Products products_of(DType dtype) {
  switch (dtype) {
    case DType::fp16:
      return {CUDA_R_16F, CUBLAS_COMPUTE_32F};
    case DType::bf16:
      return {CUDA_R_16BF, CUBLAS_COMPUTE_32F};
    case DType::fp32:
      break;
  }
  // Pedantic: no TF32, whatever the environment says.
  return {CUDA_R_32F, CUBLAS_COMPUTE_32F_PEDANTIC};
}

}  // namespace annulus::kernels::cuda
