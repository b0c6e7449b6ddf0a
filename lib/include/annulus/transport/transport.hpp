// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/device/device.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace annulus {

/// One message: all that travels to or from `peer` in one step.
struct Outgoing {
  std::int64_t peer = 0;
  const std::byte* data = nullptr;
  std::int64_t bytes = 0;
};
struct Incoming {
  std::int64_t peer = 0;
  std::byte* data = nullptr;
  std::int64_t bytes = 0;
};

/// All messages of one step of a plan.
struct StepMessages {
  std::vector<Outgoing> sends;
  std::vector<Incoming> receives;
};

/// What one step's messages took; complete once the step has been waited for and the queue synchronised.
struct StepTraffic {
  std::int64_t bytes_sent = 0;
  /// Of completed transfers: MPI's own count, or the senders' account where device memory moves without one. Never the receiver's plan.
  std::int64_t bytes_received = 0;
  double communication_ms = 0;  ///< post to completion
  /// On a device timeline, milliseconds since the queue passed the last ready(1): when the transfer could first run, and when it was
  /// complete. Both 0 where the transport keeps no timeline.
  double begin_ms = 0;
  double end_ms = 0;
};

/// Moves the messages of a rank's steps. Contract:
/// - every rank posts each step of its plan once, and waits for each once, both in the order of the steps, whether or not it has messages;
///   later steps may be posted before an earlier one is waited for;
/// - `data` is memory of the device; receive ranges never overlap send ranges or ranges still in use;
/// - before post(step) comes ready(step): a transfer starts after the work that is on `queue` then, and not after later work, whether that
///   is enqueued before or after post();
/// - post() returns without waiting for peers; several calls may be needed from all ranks before anything arrives;
/// - work enqueued on `queue` after wait(step) sees the received data and may overwrite what was sent;
/// - the destructor waits for what is in flight, except while unwinding, when it returns at once.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual TransportKind kind() const = 0;
  virtual std::int64_t rank() const = 0;
  virtual std::int64_t ranks() const = 0;

  /// Whether transfers are kernels: work that is enqueued before them could keep them from starting, so post() is better called before it.
  virtual bool takes_multiprocessors() const { return false; }

  /// Announces the messages of a plan: steps[t] are those that every later post(t) will pass; steps[0] is empty. Transports connect peers
  /// and map memory here. Called once before the first post(1) of a plan, with nothing in flight; an empty span ends what the last call
  /// announced and must come before that memory is freed. Collective: every rank makes the same calls.
  /// @throws InvalidArgument, on all ranks, if peers cannot reach the memory
  virtual void prepare(std::span<const StepMessages> steps) { static_cast<void>(steps); }

  /// Marks the present end of `queue`: with it, what the step sends is there and what it receives may be written.
  virtual void ready(std::int64_t step, Queue& queue) = 0;
  /// @throws RuntimeFailure naming peer, step and bytes
  virtual void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) = 0;
  virtual void wait(std::int64_t step, Queue& queue) = 0;
  /// Of a step that has been waited for; waits for its transfer if need be, watched by the watchdog. Call it for the last step before
  /// synchronising the queue, which nobody watches.
  virtual StepTraffic traffic(std::int64_t step) = 0;
};

}  // namespace annulus
