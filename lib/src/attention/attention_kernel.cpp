// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/attention_kernel.hpp>

#include <annulus/core/error.hpp>
#include <annulus/kernels/cpu.hpp>
#include <annulus/kernels/fused.hpp>
#include <annulus/kernels/fused_tile.hpp>
#include <annulus/kernels/reference.hpp>

#include "fused_kernel.hpp"
#include "task_kernel.hpp"
#include "task_operations.hpp"

#include <fmt/format.h>

#include <cmath>
#include <numbers>

namespace annulus {

void PlannedAttention::begin_gradients(Queue& /*queue*/) { ANNULUS_ASSERT(false, "this kernel has no backward pass"); }
void PlannedAttention::accumulate(Queue& /*queue*/, std::int64_t step) {
  ANNULUS_ASSERT(false, "step {}: this kernel has no backward pass", step);
}
void PlannedAttention::differentiate(Queue& /*queue*/, std::int64_t step) {
  ANNULUS_ASSERT(false, "step {}: this kernel has no backward pass", step);
}
void PlannedAttention::finish_gradients(Queue& /*queue*/) { ANNULUS_ASSERT(false, "this kernel has no backward pass"); }

std::string fused_obstacle(const Problem& problem) {
  if (!is_16_bit(problem.dtype)) { return fmt::format("it takes fp16 and bf16, and the dtype is {}", to_string(problem.dtype)); }
  if (kernels::cuda::fused::shape_of(problem.head_dim) < 0) {
    return fmt::format("it takes a head_dim that is a multiple of 8 up to 256, and this one is {}", problem.head_dim);
  }
  // It masks and takes maxima before it scales, so a factor that turns the order round or makes a NaN of infinity is not for it.
  const auto factor = static_cast<float>(problem.scale * std::numbers::log2e);
  if (!std::isnormal(factor) || factor < 0) {
    return fmt::format("it takes a positive scale within fp32, and this one is {}", problem.scale);
  }
  return {};
}

KernelKind resolve_kernel(KernelKind asked, const Problem& problem, std::int64_t tile_rows, bool hopper, bool gradients) {
  ANNULUS_EXPECTS(problem.dropout.probability == 0, "--dropout: the kernels of backend cuda drop nothing; backends cpu and reference do");
  std::string obstacle = fused_obstacle(problem);
  if (obstacle.empty() && gradients) { obstacle = "it has no backward pass, which --gradients asks for and kernel cublas has"; }
  if (obstacle.empty() && tile_rows > 0) { obstacle = "it chooses its own tiles, and --tile-rows is given"; }
  if (obstacle.empty() && !hopper) { obstacle = "it is for GPUs of compute capability 9.0 (Hopper)"; }
  switch (asked) {
    case KernelKind::automatic:
      return obstacle.empty() ? KernelKind::fused : KernelKind::cublas;
    case KernelKind::fused:
      ANNULUS_EXPECTS(obstacle.empty(), "--kernel fused cannot serve here: {}", obstacle);
      break;
    case KernelKind::cublas:
      break;
  }
  return asked;
}

std::int64_t kernel_block_rows(BackendKind backend, KernelKind kernel, std::int64_t tile_rows) {
  switch (backend) {
    case BackendKind::reference:
      return kernels::reference::kBlockRows;
    case BackendKind::cpu:
      return kernels::cpu::block_rows(tile_rows);
    case BackendKind::cuda:
      break;
  }
  return kernel == KernelKind::fused ? kernels::cuda::fused::kBlockRows : 0;
}

std::unique_ptr<AttentionKernel> make_attention_kernel(const KernelOptions& options, Device& device) {
  switch (options.kernel) {
    case KernelKind::fused:
      return make_fused_kernel(device);
    case KernelKind::automatic:
    case KernelKind::cublas:
      break;
  }
  return std::make_unique<TaskKernel>(make_task_operations(options, device), device);
}

}  // namespace annulus
