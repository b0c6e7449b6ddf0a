// SPDX-License-Identifier: Apache-2.0
#include "cuda_layer_kernel.hpp"

#include <annulus/kernels/cuda_layer.hpp>

#include "device/cuda_access.hpp"

#include <optional>

namespace annulus {

namespace {

class CudaLayerKernel final : public LayerKernel {
 public:
  explicit CudaLayerKernel(Device& device)
      : workspace_(device.allocate(kernels::cuda::WeightProducts::kWorkspaceBytes, MemoryUse::tensor)) {}

  void linear(Queue& queue, const kernels::LinearTask& task) override {
    translated([&] {
      if (!products_) { products_.emplace(workspace_.get(), stream_of(queue)); }
      products_->run(task);
    });
  }
  void transform(Queue& queue, const kernels::TransformTask& task) override {
    translated([&] { kernels::cuda::transform_rows(task, stream_of(queue)); });
  }

 private:
  Buffer workspace_;
  std::optional<kernels::cuda::WeightProducts> products_;  ///< of the first queue, which is the only one
};

}  // namespace

std::int64_t cuda_layer_kernel_bytes() { return kernels::cuda::WeightProducts::kWorkspaceBytes; }

std::unique_ptr<LayerKernel> make_cuda_layer_kernel(Device& device) { return std::make_unique<CudaLayerKernel>(device); }

}  // namespace annulus
