// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/attention_kernel.hpp>

#include "task_operations.hpp"

#include <memory>
#include <string>

namespace annulus {

/// The kernels that take tasks of addresses and strides: reference, cpu and cublas. Partials are of the whole shard.
class TaskKernel final : public AttentionKernel {
 public:
  TaskKernel(std::unique_ptr<TaskOperations> operations, Device& device) : operations_(std::move(operations)), device_(device) {}

  std::string describe() const override { return operations_->describe(); }
  bool rounds_probabilities(DType dtype) const override { return operations_->rounds_probabilities(dtype); }
  std::int64_t workspace_bytes(std::int64_t head_dim, DType dtype) const override { return operations_->workspace_bytes(head_dim, dtype); }
  bool has_gradients() const override { return operations_->gradients() != nullptr; }
  std::int64_t gradient_workspace_bytes(std::int64_t head_dim, DType dtype) const override {
    return has_gradients() ? operations_->gradients()->gradient_workspace_bytes(head_dim, dtype) : 0;
  }
  Int128 plan_bytes(const RingPlan& plan) const override;
  std::unique_ptr<PlannedAttention> prepare(const RingPlan& plan, const TensorAddresses& addresses) override;

 private:
  std::unique_ptr<TaskOperations> operations_;
  Device& device_;
};

}  // namespace annulus
