// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/attention_kernel.hpp>

#include <vector>

namespace annulus {

/// The kernels that take tasks of addresses and strides, which are their backend's attend() and finish(): reference, cpu and cublas.
/// Partials are of the whole shard.
class TaskKernel final : public AttentionKernel {
 public:
  TaskKernel(const RingPlan& plan, const TensorAddresses& addresses, Backend& backend);

  void warm_up(Queue& queue) override;
  void begin(Queue& queue) override;
  void attend(Queue& queue, std::int64_t step) override;
  void finish(Queue& queue) override;

 private:
  Backend& backend_;
  std::vector<Buffer> memory_;
  std::vector<kernels::PartialPointers> partials_;
  LoweredWork work_;
};

}  // namespace annulus
