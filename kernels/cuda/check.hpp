// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/cuda.hpp>

#include "extents.hpp"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <source_location>
#include <string>

namespace annulus::kernels::cuda {

inline std::string failure_text(const char* call, std::source_location where, const char* message) {
  return std::string(call) + " failed at " + where.file_name() + ":" + std::to_string(where.line()) + ": " + message;
}

inline void check(cudaError_t status, const char* call, std::source_location where = std::source_location::current()) {
  if (status == cudaSuccess) { return; }
  static_cast<void>(cudaGetLastError());
  throw LibraryError(failure_text(call, where, cudaGetErrorString(status)));
}

inline void check(cublasStatus_t status, const char* call, std::source_location where = std::source_location::current()) {
  if (status == CUBLAS_STATUS_SUCCESS) { return; }
  static_cast<void>(cudaGetLastError());
  throw LibraryError(failure_text(call, where, cublasGetStatusString(status)));
}

/// Follows every launch.
inline void check_launch(const char* kernel, std::source_location where = std::source_location::current()) {
  check(cudaGetLastError(), kernel, where);
}

}  // namespace annulus::kernels::cuda

#define ANNULUS_KERNELS_CHECK(call) ::annulus::kernels::cuda::check((call), #call)
