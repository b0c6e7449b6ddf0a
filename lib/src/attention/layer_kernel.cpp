// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/layer_kernel.hpp>

#include <annulus/core/error.hpp>

#include "cuda_layer_kernel.hpp"

#include <fmt/format.h>

#include <exception>

namespace annulus {

namespace {

class CpuLayerKernel final : public LayerKernel {
 public:
  CpuLayerKernel(Device& device, int threads)
      : threads_(threads), workspace_(device.allocate(kernels::cpu::linear_workspace_bytes(threads), MemoryUse::tensor)) {}

  void linear(Queue& /*queue*/, const kernels::LinearTask& task) override {
    try {
      kernels::cpu::linear(task, threads_, workspace_.get());
    } catch (const std::exception& error) { throw RuntimeFailure(fmt::format("backend cpu: layer: {}", error.what())); }
  }
  void transform(Queue& /*queue*/, const kernels::TransformTask& task) override { kernels::cpu::transform_rows(task, threads_); }

 private:
  int threads_;
  Buffer workspace_;
};

class ReferenceLayerKernel final : public LayerKernel {
 public:
  void linear(Queue& /*queue*/, const kernels::LinearTask& task) override { kernels::reference::linear(task); }
  void transform(Queue& /*queue*/, const kernels::TransformTask& task) override { kernels::reference::transform_rows(task); }
};

}  // namespace

std::int64_t layer_kernel_bytes(BackendKind backend, int threads) {
  switch (backend) {
    case BackendKind::cpu:
      return kernels::cpu::linear_workspace_bytes(threads);
    case BackendKind::reference:
      return 0;
    case BackendKind::cuda:
      break;
  }
  return cuda_layer_kernel_bytes();
}

std::unique_ptr<LayerKernel> make_layer_kernel(Device& device, int threads) {
  switch (device.kind()) {
    case BackendKind::cpu:
      return std::make_unique<CpuLayerKernel>(device, threads);
    case BackendKind::reference:
      return std::make_unique<ReferenceLayerKernel>();
    case BackendKind::cuda:
      break;
  }
  return make_cuda_layer_kernel(device);
}

}  // namespace annulus
