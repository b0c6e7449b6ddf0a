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
    for (; !flights_.empty(); flights_.pop_front()) { complete(flights_.front()); }
  } catch (const std::exception& error) { comm_.abort(error.what()); }
}

void MpiTransport::ready(std::int64_t /*step*/, Queue& queue) { queue.synchronize(); }

void MpiTransport::post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  ANNULUS_ASSERT(flights_.empty() || flights_.back().step < step, "step {} is posted while step {} is in flight", step,
                 flights_.back().step);
  traffic_[step] = {};
  Flight& flight = flights_.emplace_back();
  flight.step = step;
  flight.posted = std::chrono::steady_clock::now();
  // Messages of one pair and tag arrive in the order they were sent, so chunks need no numbers.
  for (const Incoming& message : receives) {
    for_each_message_chunk(message.bytes, [&](std::int64_t offset, int count) {
      MPI_Request& request = flight.requests.emplace_back(MPI_REQUEST_NULL);
      flight.pending.push_back({message.peer, true});
      ANNULUS_MPI(MPI_Irecv(message.data + offset, count, MPI_BYTE, checked_narrow<int>(message.peer), kTag, comm_.get(), &request));
    });
  }
  for (const Outgoing& message : sends) {
    for_each_message_chunk(message.bytes, [&](std::int64_t offset, int count) {
      MPI_Request& request = flight.requests.emplace_back(MPI_REQUEST_NULL);
      flight.pending.push_back({message.peer, false});
      ANNULUS_MPI(MPI_Isend(message.data + offset, count, MPI_BYTE, checked_narrow<int>(message.peer), kTag, comm_.get(), &request));
    });
    traffic_[step].bytes_sent += message.bytes;
  }
}

void MpiTransport::wait(std::int64_t step, Queue& /*queue*/) {
  ANNULUS_ASSERT(!flights_.empty() && flights_.front().step == step, "step {} is waited for and is not the first in flight", step);
  complete(flights_.front());
  flights_.pop_front();
}

void MpiTransport::complete(Flight& flight) {
  std::vector<MPI_Request>& requests = flight.requests;
  StepTraffic& traffic = traffic_[flight.step];
  std::vector<int> indices(requests.size());
  std::vector<MPI_Status> statuses(requests.size());
  std::size_t open = requests.size();
  if (open == 0) { return; }
  while (open > 0) {
    const auto waited = std::find_if(requests.begin(), requests.end(), [](MPI_Request request) { return request != MPI_REQUEST_NULL; });
    const std::int64_t peer = flight.pending[static_cast<std::size_t>(waited - requests.begin())].peer;
    const Watchdog::Wait wait = comm_.waiting("messages", peer);
    int completed = 0;
    while (completed == 0) {
      ANNULUS_MPI(MPI_Testsome(static_cast<int>(requests.size()), requests.data(), &completed, indices.data(), statuses.data()));
      if (completed == 0) { std::this_thread::yield(); }
    }
    for (int i = 0; i < completed; ++i) {
      const auto index = static_cast<std::size_t>(indices[static_cast<std::size_t>(i)]);
      if (!flight.pending[index].incoming) { continue; }
      int count = 0;
      ANNULUS_MPI(MPI_Get_count(&statuses[static_cast<std::size_t>(i)], MPI_BYTE, &count));
      traffic.bytes_received += count;
    }
    open -= static_cast<std::size_t>(completed);
  }
  traffic.communication_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - flight.posted).count();
}

StepTraffic MpiTransport::traffic(std::int64_t step) { return traffic_[step]; }

}  // namespace annulus
