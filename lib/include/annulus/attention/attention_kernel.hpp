// SPDX-License-Identifier: Apache-2.0
// The seam to the attention kernels: what a rank's plan asks of the kernel that attends for it.
#pragma once

#include <annulus/attention/lower.hpp>
#include <annulus/backend/backend.hpp>
#include <annulus/core/enums.hpp>
#include <annulus/core/problem.hpp>
#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <memory>
#include <string>

namespace annulus {

/// Attention of one rank's plan at fixed addresses. It owns the running partials, whose layout is nobody else's business, and whatever the
/// kernel needs besides. Everything is enqueued on the queue that is given, one and the same for its life. Q, K and V are never written.
class AttentionKernel {
 public:
  virtual ~AttentionKernel() = default;
  /// Lets a device load the code that the steps will need, by a small part of their work. Before the first begin(), which wipes out the
  /// result; the queue may still be at it.
  virtual void warm_up(Queue& queue) = 0;
  /// Nothing is attended yet.
  virtual void begin(Queue& queue) = 0;
  /// Attends the work of one step; each step once, in ascending order.
  virtual void attend(Queue& queue, std::int64_t step) = 0;
  /// Makes all rows of O and LSE what they should be. A row that no branch covers gets O 0 and LSE -inf.
  virtual void finish(Queue& queue) = 0;

  /// From here to possible_flops() the clock cycles of the steps are counted, by kernels that know what a device can do in one; false: this
  /// one does not.
  virtual bool count_cycles(Queue& /*queue*/) { return false; }
  /// What the device's tensor cores could have done in the cycles counted, of the slowest multiprocessor in each launch. Each step must
  /// have been attended at most once. Waits for the queue.
  virtual double possible_flops(Queue& /*queue*/) { return 0; }
};

/// Why kernel fused cannot serve such a problem, whatever the device; empty if it can.
std::string fused_obstacle(const Problem& problem);

/// The kernel that `asked` means for a problem on backend cuda; `hopper`: every GPU in question is one.
/// @throws InvalidArgument with the reason if the kernel that is asked for cannot serve
KernelKind resolve_kernel(KernelKind asked, const Problem& problem, std::int64_t tile_rows, bool hopper);

/// Bytes that the kernel takes for one plan: the partials, and lists of its work. `accumulator_bytes`: of a number of the partials of
/// kernels that are their backend's attend() and finish().
Int128 kernel_bytes(KernelKind kernel, const RingPlan& plan, std::int64_t accumulator_bytes);

/// The kernel, ready for this plan; KernelKind::automatic is that of a backend with only one. All arguments and the memory must outlive it.
std::unique_ptr<AttentionKernel> make_attention_kernel(KernelKind kernel, const RingPlan& plan, const TensorAddresses& addresses,
                                                       Backend& backend);

}  // namespace annulus
