// SPDX-License-Identifier: Apache-2.0
// The seam to the attention kernels: what a session asks of its kernel, and what a rank's plan asks of it.
#pragma once

#include <annulus/attention/lower.hpp>
#include <annulus/core/enums.hpp>
#include <annulus/core/problem.hpp>
#include <annulus/device/device.hpp>
#include <annulus/plan/plan.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace annulus {

/// Attention of one rank's plan at fixed addresses. It owns the running partials, whose layout is nobody else's business, and whatever the
/// kernel needs for the plan besides. Everything is enqueued on the queue that is given, one and the same for its life. Q, K and V are
/// never written.
class PlannedAttention {
 public:
  virtual ~PlannedAttention() = default;
  /// Lets a device load the code that the steps will need, by a small part of their work. Before the first begin(), which wipes out the
  /// result; the queue may still be at it.
  virtual void warm_up(Queue& queue) = 0;
  /// Nothing is attended yet.
  virtual void begin(Queue& queue) = 0;
  /// Attends the work of one step; each step once, in ascending order.
  virtual void attend(Queue& queue, std::int64_t step) = 0;
  /// Makes all rows of O and LSE what they should be. A row that no branch covers gets O 0 and LSE -inf.
  virtual void finish(Queue& queue) = 0;

  /// The backward pass of a plan with gradients, between finish() and the next begin(): what the steps need is made of the partials, each
  /// step of it is first given what its messages brought and then differentiated, in ascending order, and dQ, dK and dV are rounded.
  virtual void begin_gradients(Queue& queue);
  virtual void accumulate(Queue& queue, std::int64_t step);
  virtual void differentiate(Queue& queue, std::int64_t step);
  virtual void finish_gradients(Queue& queue);

  /// From here to possible_flops() the clock cycles of the steps are counted, by kernels that know what a device can do in one; false: this
  /// one does not.
  virtual bool count_cycles(Queue& /*queue*/) { return false; }
  /// What the device's tensor cores could have done in the cycles counted, of the slowest multiprocessor in each launch. Each step must
  /// have been attended at most once. Waits for the queue.
  virtual double possible_flops(Queue& /*queue*/) { return 0; }
};

/// An attention kernel on one device, for all ranks that run there. It owns what they share; used by one host thread at a time.
class AttentionKernel {
 public:
  virtual ~AttentionKernel() = default;
  /// One line for reports: what it runs on and which library does the products.
  virtual std::string describe() const = 0;
  /// Whether, for inputs of this dtype, the probabilities are rounded to it before they meet V (products that take 16-bit operands).
  virtual bool rounds_probabilities(DType dtype) const = 0;
  /// Bytes of the device that all plans of such a problem share, at most; taken when the first of them attends.
  virtual std::int64_t workspace_bytes(std::int64_t head_dim, DType dtype) const = 0;
  /// Whether it has a backward pass.
  virtual bool has_gradients() const { return false; }
  /// As workspace_bytes(), of a backward pass; the same memory serves both.
  virtual std::int64_t gradient_workspace_bytes(std::int64_t /*head_dim*/, DType /*dtype*/) const { return 0; }
  /// Bytes of the device that one plan takes: the partials, and lists of its work.
  virtual Int128 plan_bytes(const RingPlan& plan) const = 0;
  /// Ready for this plan. All arguments, the memory and this must outlive it.
  /// @throws RuntimeFailure if there is not enough memory
  virtual std::unique_ptr<PlannedAttention> prepare(const RingPlan& plan, const TensorAddresses& addresses) = 0;
};

/// Settings a kernel is made from.
struct KernelOptions {
  KernelKind kernel = KernelKind::automatic;       ///< of backend cuda, where automatic is cublas; the others have one
  int threads = 1;                                 ///< of the cpu kernel
  std::int64_t tile_rows = 0;                      ///< query rows of a tile; 0 lets the kernel choose
  std::atomic<std::uint64_t>* progress = nullptr;  ///< the cpu and reference kernels count what they have done there; may be null
};

/// The kernel, on a device that must outlive it.
/// @throws InvalidArgument if an option is out of range, RuntimeFailure if this CPU lacks the instructions, NotCompiled
std::unique_ptr<AttentionKernel> make_attention_kernel(const KernelOptions& options, Device& device);

/// Why kernel fused cannot serve such a problem, whatever the device; empty if it can.
std::string fused_obstacle(const Problem& problem);

/// The kernel that `asked` means for a problem on backend cuda; `hopper`: every GPU in question is one. Kernel fused has no backward pass.
/// @throws InvalidArgument with the reason if the kernel that is asked for cannot serve
KernelKind resolve_kernel(KernelKind asked, const Problem& problem, std::int64_t tile_rows, bool hopper, bool gradients = false);

/// Rows of a block of the kernel, from which it keeps an order of keys (SegmentPlace); 0 if it keeps none. Known without a device.
std::int64_t kernel_block_rows(BackendKind backend, KernelKind kernel, std::int64_t tile_rows);

}  // namespace annulus
