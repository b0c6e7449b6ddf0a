// SPDX-License-Identifier: Apache-2.0
// Linked instead of cublas_operations.cpp, cuda_layer_kernel.cpp and fused_kernel.cpp in a build without CUDA.
#include <annulus/attention/product_rate.hpp>
#include <annulus/core/error.hpp>

#include "cuda_layer_kernel.hpp"
#include "fused_kernel.hpp"
#include "task_operations.hpp"

namespace annulus {
namespace {

[[noreturn]] void refuse(const char* kernel) {
  throw NotCompiled(fmt::format("kernel {} is not compiled into this binary: it is built without CUDA", kernel));
}

}  // namespace

std::unique_ptr<AttentionKernel> make_fused_kernel(Device& /*device*/) { refuse("fused"); }

std::unique_ptr<TaskOperations> make_cublas_operations(const KernelOptions& /*options*/, Device& /*device*/) { refuse("cublas"); }

std::int64_t cuda_layer_kernel_bytes() { return 0; }

std::unique_ptr<LayerKernel> make_cuda_layer_kernel(Device& /*device*/) { refuse("cublas"); }

double product_rate(DType /*dtype*/) { throw NotCompiled("this binary is built without CUDA"); }

}  // namespace annulus
