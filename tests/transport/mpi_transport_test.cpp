// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/device/device.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/make_transport.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <cstring>
#include <memory>
#include <random>
#include <vector>

using namespace annulus;

namespace {

std::byte pattern(std::int64_t source, std::int64_t target, std::int64_t step, std::int64_t index) {
  return static_cast<std::byte>((source * 131 + target * 31 + step * 7 + index * 13 + index / 251) & 0xff);
}

std::vector<std::byte> message(std::int64_t source, std::int64_t target, std::int64_t step, std::int64_t bytes) {
  std::vector<std::byte> data(static_cast<std::size_t>(bytes));
  for (std::int64_t i = 0; i < bytes; ++i) { data[static_cast<std::size_t>(i)] = pattern(source, target, step, i); }
  return data;
}

struct HostSetup {
  std::unique_ptr<Device> backend = make_device({.kind = BackendKind::reference, .threads = 1, .number = 0});
  std::unique_ptr<Queue> queue = backend->make_queue();
};

}  // namespace

TEST_CASE("every byte of random message patterns arrives, posted up to three steps ahead, and only completed receives are counted") {
  const Communicator& comm = test::world();
  HostSetup host;
  const auto transport = make_transport(comm.size() == 1 ? TransportKind::self : TransportKind::mpi, comm, *host.backend, false);
  struct OfStep {
    std::vector<std::vector<std::byte>> sent;
    std::vector<std::vector<std::byte>> received;
    std::vector<Outgoing> sends;
    std::vector<Incoming> receives;
    std::int64_t expected = 0;
  };
  constexpr std::int64_t kSteps = 60;
  const std::int64_t ahead = GENERATE(1, 2, 3);
  std::mt19937_64 random(11);  // the same on all ranks: all know who sends what
  std::vector<OfStep> steps(1);
  for (std::int64_t step = 1; step <= kSteps; ++step) {
    OfStep& own = steps.emplace_back();
    for (std::int64_t source = 0; source < comm.size(); ++source) {
      for (std::int64_t target = 0; target < comm.size(); ++target) {
        const bool exists = random() % 2 == 0 && source != target;
        const auto bytes = static_cast<std::int64_t>(random() % (step % 10 == 0 ? 3000000 : 5000)) + 1;
        if (!exists) { continue; }
        if (source == comm.rank()) {
          own.sent.push_back(message(source, target, step, bytes));
          own.sends.push_back({target, own.sent.back().data(), bytes});
        }
        if (target == comm.rank()) {
          own.received.emplace_back(static_cast<std::size_t>(bytes));
          own.receives.push_back({source, own.received.back().data(), bytes});
          own.expected += bytes;
        }
      }
    }
  }
  const auto post = [&](std::int64_t step) {
    if (step > kSteps) { return; }
    const OfStep& own = steps[static_cast<std::size_t>(step)];
    transport->ready(step, *host.queue);
    transport->post(step, own.sends, own.receives);
  };
  for (std::int64_t step = 1; step <= ahead; ++step) { post(step); }

  for (std::int64_t step = 1; step <= kSteps; ++step) {
    transport->wait(step, *host.queue);
    post(step + ahead);

    const OfStep& own = steps[static_cast<std::size_t>(step)];
    CHECK(transport->traffic(step).bytes_received == own.expected);
    for (const Incoming& incoming : own.receives) {
      const auto good = message(incoming.peer, comm.rank(), step, incoming.bytes);
      CHECK(std::memcmp(good.data(), incoming.data, good.size()) == 0);
    }
  }
}

TEST_CASE("ranks agree on the lowest rank's failure and one of them reports it") {
  const Communicator& comm = test::world();
  const auto fail_on_odd = [&] {
    if (comm.rank() % 2 == 1) { throw InvalidArgument(fmt::format("rank {} dislikes it", comm.rank())); }
  };
  if (comm.size() == 1) {
    CHECK_NOTHROW(together(comm, fail_on_odd));
    return;
  }
  bool thrown = false;
  try {
    together(comm, fail_on_odd);
  } catch (const AgreedError& error) {
    thrown = true;
    CHECK(error.code() == ExitCode::bad_input);
    CHECK(std::string(error.what()) == "rank 1 dislikes it");
    CHECK(error.reporter() == (comm.rank() == 1));
  }
  CHECK(thrown);
}

TEST_CASE("sums, gathers and broadcasts reach every rank") {
  const Communicator& comm = test::world();
  CHECK(comm.sum(comm.rank() + 1) == comm.size() * (comm.size() + 1) / 2);
  CHECK(comm.max(comm.rank()) == comm.size() - 1);
  CHECK(comm.broadcast(comm.rank() == 0 ? std::string("from zero") : std::string(), 0) == "from zero");
  const std::vector<std::string> all = comm.all_gather(std::string(static_cast<std::size_t>(comm.rank()), 'x'));
  REQUIRE(static_cast<std::int64_t>(all.size()) == comm.size());
  for (std::int64_t rank = 0; rank < comm.size(); ++rank) {
    CHECK(static_cast<std::int64_t>(all[static_cast<std::size_t>(rank)].size()) == rank);
  }
  const std::vector<std::string> gathered = comm.gather(fmt::format("rank {}", comm.rank()), 0);
  if (comm.rank() == 0) {
    for (std::int64_t rank = 0; rank < comm.size(); ++rank) {
      CHECK(gathered[static_cast<std::size_t>(rank)] == fmt::format("rank {}", rank));
    }
  }
}

TEST_CASE("transports that do not fit the job are refused") {
  const Communicator& comm = test::world();
  HostSetup host;
  CHECK_THROWS_AS(make_transport(TransportKind::nccl, comm, *host.backend, false), InvalidArgument);
  CHECK_THROWS_AS(make_transport(TransportKind::loopback, comm, *host.backend, false), InvalidArgument);
  if (comm.size() > 1) { CHECK_THROWS_AS(make_transport(TransportKind::self, comm, *host.backend, false), InvalidArgument); }
}
