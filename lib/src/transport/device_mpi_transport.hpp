// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/unwinding.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include "gpu/cuda_handles.hpp"
#include "step_ledger.hpp"

#include <cuda_runtime.h>
#include <mpi.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

namespace annulus {

/// Host memory that copy engines reach at full speed.
class PinnedBuffer {
 public:
  explicit PinnedBuffer(std::size_t bytes);
  PinnedBuffer(PinnedBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  PinnedBuffer& operator=(PinnedBuffer&&) = delete;
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  /// Leaves the memory alone while unwinding: MPI may still write there.
  ~PinnedBuffer();
  std::byte* get() const { return data_; }

 private:
  std::byte* data_ = nullptr;
};

/// Device memory over MPI. A thread moves the messages, so that they travel under the work of the step before: each message goes in chunks
/// through two pinned buffers on either side (device to host, MPI, host to device, all three at once), or directly where MPI takes device
/// pointers. wait() blocks the host until the last copy to the device is enqueued, not until it is done.
class DeviceMpiTransport final : public Transport {
 public:
  /// How device memory gets to MPI.
  enum class Path { direct, staged };

  /// `device` must be current.
  DeviceMpiTransport(const Communicator& comm, int number, Path path);
  ~DeviceMpiTransport() override;

  TransportKind kind() const override { return TransportKind::mpi; }
  std::int64_t rank() const override { return comm_.rank(); }
  std::int64_t ranks() const override { return comm_.size(); }
  void ready(std::int64_t step, Queue& queue) override;
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override;
  void wait(std::int64_t step, Queue& queue) override;
  StepTraffic traffic(std::int64_t step) override;

 private:
  struct Job {
    StepLedger::Entry* entry = nullptr;
    std::vector<Outgoing> sends;
    std::vector<Incoming> receives;
  };
  struct Chunk;
  class Departure;
  class Landing;

  void run();
  void move_staged(const Job& job);
  void move_direct(const Job& job);
  void finish_step(const Job& job);
  void rethrow_failure();

  Communicator comm_;
  Path path_;
  int number_;
  Unwinding unwinding_;
  CudaStream out_;
  CudaStream in_;
  CudaEvent left_{cudaEventDisableTiming};  ///< all of a step's sends have left the device
  std::vector<std::pair<PinnedBuffer, CudaEvent>> staging_;

  std::mutex mutex_;  ///< of what follows
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  std::uint32_t enqueued_ = 0;  ///< number of the last step whose end is enqueued
  bool busy_ = false;
  std::exception_ptr failure_;

  std::atomic<bool> stop_ = false;
  StepLedger ledger_;
  std::thread thread_;
};

}  // namespace annulus
