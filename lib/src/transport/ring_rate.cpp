// SPDX-License-Identifier: Apache-2.0
#include <annulus/transport/ring_rate.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace annulus {

namespace {

constexpr std::int64_t kSteps = 7;
/// The first messages connect the ranks and touch the memory.
constexpr std::int64_t kWarmSteps = 2;

/// Byte `i` of a rank's message. Messages of neighbouring ranks differ in every byte, and parts of one that change places are noticed.
std::byte pattern_at(std::int64_t rank, std::size_t i) {
  constexpr std::uint64_t kPrime = 251;
  return static_cast<std::byte>((static_cast<std::uint64_t>(rank) * 17 + 1 + i) % kPrime);
}

double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double gbs(std::int64_t bytes, double ms) { return static_cast<double>(bytes) / (ms * 1e6); }

/// Milliseconds of `body` on the slowest rank. Collective.
template <class Body>
double slowest_ms(const Communicator& comm, Body&& body) {
  comm.barrier();
  const auto begin = std::chrono::steady_clock::now();
  std::forward<Body>(body)();
  return comm.max(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
}

}  // namespace

RingRate measure_ring(const Communicator& comm, Device& device, Transport& transport, std::int64_t bytes) {
  const std::int64_t next = (comm.rank() + 1) % comm.size();
  const std::int64_t before = (comm.rank() + comm.size() - 1) % comm.size();
  Buffer outgoing;
  Buffer incoming;
  std::unique_ptr<Queue> queue;
  std::vector<std::byte> host;
  together(comm, [&] {
    outgoing = device.allocate(bytes, MemoryUse::slot);
    incoming = device.allocate(bytes, MemoryUse::slot);
    queue = device.make_queue();
    host.resize(static_cast<std::size_t>(bytes));
    for (std::size_t i = 0; i < host.size(); ++i) { host[i] = pattern_at(comm.rank(), i); }
    device.upload(*queue, outgoing.get(), host.data(), bytes);
    device.upload(*queue, incoming.get(), host.data(), bytes);  // not what is to arrive
    queue->synchronize();
  });
  const StepMessages messages{{{next, outgoing.get(), bytes}}, {{before, incoming.get(), bytes}}};
  std::vector<StepMessages> steps(static_cast<std::size_t>(kSteps + 1), messages);
  steps.front() = {};

  RingRate rate{.bytes = bytes};
  fail_fast(comm, [&] {
    transport.prepare(steps);
    std::vector<double> passed_ms;
    for (std::int64_t step = 1; step <= kSteps; ++step) {
      const double ms = slowest_ms(comm, [&] {
        transport.ready(step, *queue);
        transport.post(step, messages.sends, messages.receives);
        transport.wait(step, *queue);
        static_cast<void>(transport.traffic(step));
        queue->synchronize();
      });
      if (step > kWarmSteps) { passed_ms.push_back(ms); }
    }
    transport.prepare({});
    rate.transport_gbs = gbs(bytes, median_of(passed_ms));

    device.download(*queue, host.data(), incoming.get(), bytes);
    queue->synchronize();
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < host.size(); ++i) { wrong += host[i] != pattern_at(before, i) ? 1 : 0; }
    rate.wrong_bytes = comm.sum(wrong);

    std::vector<double> copied_ms;
    for (std::int64_t step = 1; step <= kSteps; ++step) {
      const double ms = slowest_ms(comm, [&] {
        device.copy(*queue, incoming.get(), outgoing.get(), bytes);
        queue->synchronize();
      });
      if (step > kWarmSteps) { copied_ms.push_back(ms); }
    }
    rate.copy_gbs = gbs(bytes, median_of(copied_ms));
  });
  return rate;
}

}  // namespace annulus
