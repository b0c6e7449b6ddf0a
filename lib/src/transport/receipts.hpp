// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include <mpi.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace annulus {

/// What senders say they have sent, for transports that move device memory without telling the receiver how much came: with every message
/// goes a receipt over MPI, so that a step's bytes are counted from the other side's account and not from the receiver's own plan. A
/// receipt says nothing of when data arrives; ask for it once the transfer is done. For one thread.
class Receipts {
 public:
  /// `comm` must outlive it, and sends nothing else with its tag.
  explicit Receipts(const Communicator& comm) : comm_(comm) {}

  /// Tells the peers what this rank sends them in `step`, and notes whose receipts are due. Returns at once unless receipts of the step's
  /// last run are still out.
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives);

  /// Bytes that the peers say they sent in the last run of `step`; waits for their receipts.
  /// @throws RuntimeFailure naming peer and steps if a receipt is of another step than is due
  std::int64_t received(std::int64_t step);

  /// Waits for every receipt that is due, and for those sent.
  void drain();

 private:
  struct Receipt {
    std::int64_t step = 0;
    std::int64_t bytes = 0;
  };
  void receive_next(std::int64_t peer);

  const Communicator& comm_;
  std::map<std::int64_t, std::deque<std::int64_t>> due_;  ///< by peer: the steps of receipts to come, in order
  std::map<std::int64_t, std::int64_t> bytes_;            ///< by step, of its last run
  std::vector<std::unique_ptr<std::pair<Receipt, MPI_Request>>> in_flight_;
};

}  // namespace annulus
