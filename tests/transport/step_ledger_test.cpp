// SPDX-License-Identifier: Apache-2.0
// The ledger alone, on streams of the test: what transports share in counting, timing and waiting.
#include "transport/step_ledger.hpp"

#include <annulus/core/error.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus_test.hpp>

#include "gpu/cuda_handles.hpp"
#include "gpu_test_kernels.hpp"
#include "mpi_world.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>

using namespace annulus;

namespace {

/// A rank with a queue, and a stream that moves its data.
struct Setup {
  explicit Setup(std::function<void()> check = {})
      : ledger(test::world(), "a transfer of the test", StepLedger::Counting::by_transport, std::move(check)) {}

  CudaStream queue;
  CudaStream mover{StreamPriority::high};
  StepLedger ledger;
  std::byte byte{};

  /// A step of so many bytes each way, whose data takes `microseconds`.
  StepLedger::Entry& pass(std::int64_t step, std::int64_t bytes, std::int64_t microseconds) {
    ledger.ready(step, queue.get());
    const std::array<Outgoing, 1> sends{{{0, &byte, bytes}}};
    const std::array<Incoming, 1> receives{{{0, &byte, bytes}}};
    StepLedger::Entry& entry = ledger.open(step, sends, receives);
    if (entry.number == 0) { return entry; }
    ANNULUS_CUDA(cudaStreamWaitEvent(mover.get(), entry.ready.passed(), cudaEventWaitDefault));
    ledger.begin(entry, mover.get());
    test::keep_busy(mover.get(), microseconds);
    entry.bytes_received = bytes;
    ledger.complete(entry, mover.get());
    return entry;
  }
};

bool skip_without_gpu() {
  if (!visible_gpus().empty()) { return false; }
  test::skip("no GPU");
  return true;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("a ledger tells when a transfer could start, began and was done, and what it brought") {
  if (skip_without_gpu()) { return; }
  Setup setup;
  for (int run = 0; run < 3; ++run) {
    setup.pass(1, 100, 2000);
    test::keep_busy(setup.queue.get(), 5000);
    setup.ledger.mark_waiting(1, setup.queue.get());
    setup.ledger.wait(1, setup.queue.get());
    setup.pass(2, 7, 3000);

    const StepTraffic first = setup.ledger.traffic(1);
    CHECK(first.bytes_sent == 100);
    CHECK(first.bytes_received == 100);
    CHECK(first.communication_ms >= 1.9);
    CHECK(first.begin_ms < 1.0);
    CHECK(first.end_ms >= 1.9);
    CHECK(first.end_ms < 4.9);  // beside the queue's work
    const StepTraffic second = setup.ledger.traffic(2);
    CHECK(second.bytes_sent == 7);
    CHECK(second.begin_ms >= 4.9);  // behind it
    CHECK(second.end_ms >= second.begin_ms + 2.9);
  }
  setup.ledger.drain();
}

TEST_CASE("steps without bytes touch no stream, and later ones may be open at once") {
  if (skip_without_gpu()) { return; }
  Setup setup;
  CHECK(setup.pass(1, 0, 0).number == 0);
  const std::uint32_t first = setup.pass(2, 1, 1000).number;
  CHECK(setup.pass(3, 1, 1000).number == first + 1);
  CHECK(setup.pass(4, 0, 0).number == 0);
  setup.ledger.wait(1, setup.queue.get());
  setup.ledger.wait(4, setup.queue.get());
  CHECK(setup.ledger.traffic(1).communication_ms == 0.0);
  setup.ledger.wait(3, setup.queue.get());
  ANNULUS_CUDA(cudaStreamSynchronize(setup.queue.get()));
  CHECK(setup.ledger.traffic(3).end_ms >= setup.ledger.traffic(2).end_ms);
  setup.ledger.drain();
  CHECK(is_idle(setup.mover.get()));
}

TEST_CASE("the queue waits for a transfer, and traffic() for its end") {
  if (skip_without_gpu()) { return; }
  Setup setup;
  setup.pass(1, 5, 200000);
  setup.ledger.wait(1, setup.queue.get());
  CHECK_FALSE(is_idle(setup.queue.get()));
  const auto start = std::chrono::steady_clock::now();
  CHECK(setup.ledger.traffic(1).communication_ms >= 199.0);
  CHECK(seconds_since(start) > 0.1);
  ANNULUS_CUDA(cudaStreamSynchronize(setup.queue.get()));
}

TEST_CASE("what the check of a transport finds ends the wait for a transfer that never comes") {
  if (skip_without_gpu()) { return; }
  if (test::world().size() > 1) { return; }  // with several ranks it ends the job
  std::atomic<bool> failed = false;
  Setup setup([&] {
    if (failed) { throw RuntimeFailure("the link is down"); }
  });
  setup.pass(1, 5, 400000);
  failed = true;
  const auto start = std::chrono::steady_clock::now();
  CHECK_THROWS_WITH(setup.ledger.traffic(1), "the link is down");
  CHECK(seconds_since(start) < 0.3);
  ANNULUS_CUDA(cudaStreamSynchronize(setup.mover.get()));
}

TEST_CASE("numbers of transfers go on from run to run") {
  if (skip_without_gpu()) { return; }
  Setup setup;
  std::uint32_t before = 0;
  for (int run = 0; run < 1000; ++run) {
    const std::uint32_t number = setup.pass(1, 3, 0).number;
    CHECK(number == before + 1);
    before = number;
    setup.ledger.wait(1, setup.queue.get());
  }
  CHECK(setup.ledger.traffic(1).bytes_received == 3);
  setup.ledger.drain();
}
