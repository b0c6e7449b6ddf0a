// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/product_rate.hpp>
#include <annulus/core/error.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus/kernels/alike.hpp>
#include <annulus/kernels/cublas.hpp>
#include <annulus/kernels/cuda.hpp>

#include "device/cuda_access.hpp"
#include "gpu/cuda_handles.hpp"
#include "gpu/profiler_range.hpp"
#include "task_operations.hpp"

#include <cublas_v2.h>

#include <algorithm>
#include <vector>

namespace annulus {
namespace {

namespace cuda = kernels::cuda;

class CublasOperations final : public TaskOperations, public GradientOperations {
 public:
  CublasOperations(std::int64_t tile_rows, Device& device) : tile_rows_(tile_rows), device_(device), number_(device_of(device)) {
    const DeviceGuard guard(number_);
    translated([&] { attention_ = std::make_unique<cuda::CublasAttention>(); });
  }
  CublasOperations(const CublasOperations&) = delete;
  CublasOperations& operator=(const CublasOperations&) = delete;
  ~CublasOperations() override {
    if (unwinding()) { return; }
    // A failure has nobody to tell: the work that it belongs to has been checked when it was enqueued.
    static_cast<void>(cudaSetDevice(number_));
  }

  std::string describe() const override {
    int major = 0;
    int minor = 0;
    int patch = 0;
    static_cast<void>(cublasGetProperty(MAJOR_VERSION, &major));
    static_cast<void>(cublasGetProperty(MINOR_VERSION, &minor));
    static_cast<void>(cublasGetProperty(PATCH_LEVEL, &patch));
    return fmt::format("{}, kernel cublas, products by cuBLAS {}.{}.{}", device_.describe(), major, minor, patch);
  }
  bool rounds_probabilities(DType dtype) const override { return is_16_bit(dtype); }
  std::int64_t workspace_bytes(std::int64_t head_dim, DType dtype) const override {
    std::int64_t bytes = 0;
    for (const kernels::Mask mask : kernels::kMasks) {
      bytes = std::max(bytes, cuda::CublasAttention::workspace_bytes(tiling_for(head_dim, dtype, mask)));
    }
    return bytes;
  }
  std::int64_t accumulator_bytes() const override { return sizeof(float); }

  void fill_identity(Queue& queue, const kernels::PartialPointers& partial, std::int64_t rows, std::int64_t head_dim) override {
    const ProfilerRange range("fill_identity");
    const DeviceGuard guard(number_);
    translated([&] { cuda::fill_identity(partial, rows, head_dim, stream_of(queue)); });
  }
  void add_zero_keys(Queue& queue, std::span<const kernels::ZeroKeysTask> tasks) override {
    const ProfilerRange range("add_zero_keys");
    const DeviceGuard guard(number_);
    translated([&] {
      for (const kernels::ZeroKeysTask& task : tasks) { cuda::add_zero_keys(task, stream_of(queue)); }
    });
  }
  void attend(Queue& queue, std::span<const kernels::AttendTask> tasks) override {
    const ProfilerRange range("attend");
    const DeviceGuard guard(number_);
    kernels::for_each_alike(tasks, alike_, [&](std::span<const kernels::AttendTask> alike) { attend_alike(queue, alike); });
  }
  void finish(Queue& queue, const kernels::FinishTask& task) override {
    const ProfilerRange range("finish");
    const DeviceGuard guard(number_);
    ANNULUS_ASSERT(task.partials >= 1 && task.partials <= kernels::kMaxPartials, "{} partials", task.partials);
    translated([&] { cuda::finish(task, stream_of(queue)); });
  }

  GradientOperations* gradients() override { return this; }
  std::int64_t gradient_workspace_bytes(std::int64_t /*head_dim*/, DType dtype) const override {
    return cuda::CublasGradients::workspace_bytes(gradient_tiling_for(dtype));
  }
  void begin_gradients(Queue& queue, const kernels::BeginGradientsTask& task) override {
    const ProfilerRange range("begin_gradients");
    const DeviceGuard guard(number_);
    translated([&] { cuda::begin_gradients(task, stream_of(queue)); });
  }
  void differentiate(Queue& queue, std::span<const kernels::GradientTask> tasks) override {
    const ProfilerRange range("differentiate");
    const DeviceGuard guard(number_);
    for (const kernels::GradientTask& task : tasks) {
      const kernels::AttendTask& at = task.attend;
      reserve_workspace(gradient_workspace_bytes(at.head_dim, at.dtype));
      translated([&] {
        if (!gradients_) { gradients_ = std::make_unique<cuda::CublasGradients>(); }
        gradients_->differentiate(task, gradient_tiling_for(at.dtype), workspace_.get(), workspace_.bytes(), stream_of(queue));
      });
    }
  }
  void clear(Queue& queue, std::span<const kernels::ClearTask> tasks) override {
    const DeviceGuard guard(number_);
    translated([&] {
      for (const kernels::ClearTask& task : tasks) { cuda::clear(task, stream_of(queue)); }
    });
  }
  void add(Queue& queue, std::span<const kernels::AddTask> tasks) override {
    const DeviceGuard guard(number_);
    translated([&] {
      for (const kernels::AddTask& task : tasks) { cuda::add(task, stream_of(queue)); }
    });
  }
  void round(Queue& queue, std::span<const kernels::RoundTask> tasks) override {
    const DeviceGuard guard(number_);
    translated([&] {
      for (const kernels::RoundTask& task : tasks) { cuda::round(task, stream_of(queue)); }
    });
  }

 private:
  /// Larger than before, if it must be.
  void reserve_workspace(std::int64_t bytes) {
    if (workspace_.bytes() >= bytes) { return; }
    // Another one may come to lie where this one lay, but the chance is not worth the graphs' memory.
    translated([&] { attention_->forget(workspace_.get()); });
    workspace_.reset();
    workspace_ = device_.allocate(bytes, MemoryUse::tensor);
  }

  /// Attends tasks of one head_dim, dtype and mask.
  void attend_alike(Queue& queue, std::span<const kernels::AttendTask> tasks) {
    const kernels::AttendTask& front = tasks.front();
    reserve_workspace(workspace_bytes(front.head_dim, front.dtype));
    const cuda::CublasTiling tiling = tiling_for(front.head_dim, front.dtype, front.mask);
    translated([&] { attention_->attend(tasks, tiling, workspace_.get(), workspace_.bytes(), stream_of(queue)); });
  }

  cuda::CublasTiling tiling_for(std::int64_t head_dim, DType dtype, kernels::Mask mask) const {
    return as_told(cuda::default_tiling(head_dim, dtype, mask));
  }
  cuda::CublasTiling gradient_tiling_for(DType dtype) const { return as_told(cuda::default_gradient_tiling(dtype)); }
  /// With the rows of a tile that the user asked for, if any.
  cuda::CublasTiling as_told(cuda::CublasTiling tiling) const {
    if (tile_rows_ > 0) {
      tiling.q_tile = tile_rows_;
      tiling.causal_q_tile = tile_rows_;
      tiling.rows = std::max(tiling.rows, tile_rows_);
    }
    return tiling;
  }

  std::int64_t tile_rows_;
  Device& device_;
  int number_;
  std::unique_ptr<cuda::CublasAttention> attention_;
  std::unique_ptr<cuda::CublasGradients> gradients_;  ///< from the first backward pass on
  std::vector<kernels::AttendTask> alike_;            ///< a mixed list by masks
  Buffer workspace_;                                  ///< goes before `attention_`, which waits for its own work
};

}  // namespace

std::unique_ptr<TaskOperations> make_cublas_operations(const KernelOptions& options, Device& device) {
  constexpr std::int64_t kMostTileRows = 16384;
  ANNULUS_EXPECTS(options.tile_rows >= 0 && options.tile_rows <= kMostTileRows,
                  "tile-rows {} is out of range: the cublas kernel takes 0 to {}", options.tile_rows, kMostTileRows);
  return std::make_unique<CublasOperations>(options.tile_rows, device);
}

double product_rate(DType dtype) {
  double rate = 0;
  translated([&] { rate = cuda::product_rate(dtype); });
  return rate;
}

}  // namespace annulus
