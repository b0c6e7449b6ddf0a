// SPDX-License-Identifier: Apache-2.0
#include "receipts.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>

namespace annulus {

namespace {

constexpr int kTag = 29;
constexpr int kWords = 2;

}  // namespace

void Receipts::post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  static_cast<void>(received(step));
  bytes_[step] = 0;
  for (const Incoming& message : receives) {
    if (message.bytes > 0) { due_[message.peer].push_back(step); }
  }
  std::erase_if(in_flight_, [](auto& sent) {
    int done = 0;
    ANNULUS_MPI(MPI_Test(&sent->second, &done, MPI_STATUS_IGNORE));
    return done != 0;
  });
  for (const Outgoing& message : sends) {
    if (message.bytes == 0) { continue; }
    auto& sent = in_flight_.emplace_back(std::make_unique<std::pair<Receipt, MPI_Request>>(Receipt{step, message.bytes}, MPI_REQUEST_NULL));
    ANNULUS_MPI(MPI_Isend(&sent->first, kWords, MPI_INT64_T, checked_narrow<int>(message.peer), kTag, comm_.get(), &sent->second));
  }
}

std::int64_t Receipts::received(std::int64_t step) {
  for (auto& [peer, steps] : due_) {
    while (std::find(steps.begin(), steps.end(), step) != steps.end()) { receive_next(peer); }
  }
  return bytes_[step];
}

void Receipts::drain() {
  for (auto& [peer, steps] : due_) {
    while (!steps.empty()) { receive_next(peer); }
  }
  const Watchdog::Wait wait = comm_.waiting("receipts of what was sent");
  for (auto& sent : in_flight_) { ANNULUS_MPI(MPI_Wait(&sent->second, MPI_STATUS_IGNORE)); }
  in_flight_.clear();
}

void Receipts::receive_next(std::int64_t peer) {
  std::deque<std::int64_t>& steps = due_[peer];
  Receipt receipt;
  {
    const Watchdog::Wait wait = comm_.waiting("the receipt of a message", peer);
    ANNULUS_MPI(MPI_Recv(&receipt, kWords, MPI_INT64_T, checked_narrow<int>(peer), kTag, comm_.get(), MPI_STATUS_IGNORE));
  }
  if (receipt.step != steps.front()) {
    throw RuntimeFailure(fmt::format("rank {} has sent a message of step {} where one of step {} was due", comm_.rank_in_job(peer),
                                     receipt.step, steps.front()));
  }
  steps.pop_front();
  bytes_[receipt.step] += receipt.bytes;
}

}  // namespace annulus
