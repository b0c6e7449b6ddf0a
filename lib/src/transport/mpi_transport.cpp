// SPDX-License-Identifier: Apache-2.0
#include "mpi_transport.hpp"

#include <annulus/core/error.hpp>

#include "job/message_chunks.hpp"

#include <algorithm>
#include <thread>

namespace annulus {

namespace {

constexpr int kTag = 7;

}  // namespace

MpiTransport::MpiTransport(const Communicator& comm) : comm_(comm.duplicate()) {}

MpiTransport::~MpiTransport() {
  if (unwinding_.now()) { return; }
  try {
    complete_all();
  } catch (const std::exception& error) { comm_.abort(error.what()); }
}

void MpiTransport::post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives, Queue& queue) {
  ANNULUS_ASSERT(requests_.empty(), "step {} is posted while step {} is in flight", step, step_);
  queue.synchronize();
  step_ = step;
  posted_ = std::chrono::steady_clock::now();
  traffic_[step] = {};
  // Messages of one pair and tag arrive in the order they were sent, so chunks need no numbers.
  for (const Incoming& message : receives) {
    for_each_message_chunk(message.bytes, [&](std::int64_t offset, int count) {
      MPI_Request& request = requests_.emplace_back(MPI_REQUEST_NULL);
      pending_.push_back({message.peer, true});
      ANNULUS_MPI(MPI_Irecv(message.data + offset, count, MPI_BYTE, checked_narrow<int>(message.peer), kTag, comm_.get(), &request));
    });
  }
  for (const Outgoing& message : sends) {
    for_each_message_chunk(message.bytes, [&](std::int64_t offset, int count) {
      MPI_Request& request = requests_.emplace_back(MPI_REQUEST_NULL);
      pending_.push_back({message.peer, false});
      ANNULUS_MPI(MPI_Isend(message.data + offset, count, MPI_BYTE, checked_narrow<int>(message.peer), kTag, comm_.get(), &request));
    });
    traffic_[step].bytes_sent += message.bytes;
  }
}

void MpiTransport::wait(std::int64_t step, Queue& /*queue*/) {
  ANNULUS_ASSERT(requests_.empty() || step == step_, "step {} is waited for while step {} is in flight", step, step_);
  complete_all();
}

void MpiTransport::complete_all() {
  if (requests_.empty()) { return; }
  std::vector<int> indices(requests_.size());
  std::vector<MPI_Status> statuses(requests_.size());
  std::size_t open = requests_.size();
  while (open > 0) {
    const auto waited = std::find_if(requests_.begin(), requests_.end(), [](MPI_Request request) { return request != MPI_REQUEST_NULL; });
    const std::int64_t peer = pending_[static_cast<std::size_t>(waited - requests_.begin())].peer;
    const Watchdog::Wait wait = comm_.watchdog().waiting("messages", peer);
    int completed = 0;
    while (completed == 0) {
      ANNULUS_MPI(MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(), &completed, indices.data(), statuses.data()));
      if (completed == 0) { std::this_thread::yield(); }
    }
    for (int i = 0; i < completed; ++i) {
      const auto index = static_cast<std::size_t>(indices[static_cast<std::size_t>(i)]);
      if (!pending_[index].incoming) { continue; }
      int count = 0;
      ANNULUS_MPI(MPI_Get_count(&statuses[static_cast<std::size_t>(i)], MPI_BYTE, &count));
      traffic_[step_].bytes_received += count;
    }
    open -= static_cast<std::size_t>(completed);
  }
  requests_.clear();
  pending_.clear();
  traffic_[step_].communication_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - posted_).count();
}

StepTraffic MpiTransport::traffic(std::int64_t step) { return traffic_[step]; }

}  // namespace annulus
