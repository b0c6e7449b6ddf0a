// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/unwinding.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include "gpu/cuda_handles.hpp"
#include "step_ledger.hpp"

#include <cuda_runtime.h>
#include <nccl.h>

#include <cstdint>
#include <memory>
#include <set>
#include <span>

namespace annulus {

/// Owns one NCCL communicator. Creating it is collective.
class NcclCommunicator {
 public:
  /// Uses the device that is current.
  /// @throws RuntimeFailure
  explicit NcclCommunicator(const Communicator& comm);
  /// Aborts while unwinding, when peers may be gone; destroys otherwise, which waits for them.
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  ncclComm_t get() const { return handle_; }
  /// @throws RuntimeFailure if an operation that is or was in flight has failed
  void check_asynchronous() const;

 private:
  Communicator comm_;
  Unwinding unwinding_;
  ncclComm_t handle_ = nullptr;
};

/// One group of sends and receives per step, on a stream of high priority so that its blocks are placed before those of the attention that
/// is enqueued behind the same work.
class NcclTransport final : public Transport {
 public:
  /// `number` is the device's, and current.
  NcclTransport(const Communicator& comm, Device& device, int number, bool share_gpu);
  ~NcclTransport() override;

  TransportKind kind() const override { return TransportKind::nccl; }
  std::int64_t rank() const override { return comm_.rank(); }
  std::int64_t ranks() const override { return comm_.size(); }
  /// Connects the pairs of the plan, which NCCL would otherwise do inside the first step.
  void prepare(std::span<const StepMessages> steps) override;
  bool takes_multiprocessors() const override { return true; }
  void ready(std::int64_t step, Queue& queue) override;
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override;
  void wait(std::int64_t step, Queue& queue) override;
  StepTraffic traffic(std::int64_t step) override;

 private:
  Communicator comm_;
  Device& device_;
  int number_;
  Unwinding unwinding_;
  std::unique_ptr<CudaStream> stream_;
  std::unique_ptr<NcclCommunicator> nccl_;
  std::unique_ptr<StepLedger> ledger_;  ///< after nccl_: its thread looks there
  std::set<std::int64_t> connected_to_;
  std::set<std::int64_t> connected_from_;
};

}  // namespace annulus
