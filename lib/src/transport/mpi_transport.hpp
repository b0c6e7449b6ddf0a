// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/unwinding.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include <chrono>
#include <deque>
#include <map>
#include <vector>

namespace annulus {

/// Messages by MPI_Isend and MPI_Irecv on host memory, in chunks below 2 GiB. wait() blocks the host and polls; completion is what it sees.
class MpiTransport final : public Transport {
 public:
  explicit MpiTransport(const Communicator& comm);
  ~MpiTransport() override;
  MpiTransport(const MpiTransport&) = delete;
  MpiTransport& operator=(const MpiTransport&) = delete;

  TransportKind kind() const override { return TransportKind::mpi; }
  std::int64_t rank() const override { return comm_.rank(); }
  std::int64_t ranks() const override { return comm_.size(); }
  void ready(std::int64_t step, Queue& queue) override;
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override;
  void wait(std::int64_t step, Queue& queue) override;
  StepTraffic traffic(std::int64_t step) override;

 private:
  struct Pending {
    std::int64_t peer = 0;
    bool incoming = false;
  };
  /// The messages of one step.
  struct Flight {
    std::int64_t step = 0;
    std::vector<MPI_Request> requests;
    std::vector<Pending> pending;  ///< one for each request
    std::chrono::steady_clock::time_point posted;
  };
  void complete(Flight& flight);

  Communicator comm_;
  Unwinding unwinding_;
  std::deque<Flight> flights_;  ///< steps that are posted and not waited for, ascending
  std::map<std::int64_t, StepTraffic> traffic_;
};

}  // namespace annulus
