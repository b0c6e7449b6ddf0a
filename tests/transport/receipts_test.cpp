// SPDX-License-Identifier: Apache-2.0
#include "transport/receipts.hpp"

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <array>
#include <cstddef>
#include <cstdint>

using namespace annulus;
using annulus::test::world;

namespace {

std::int64_t next_rank() { return (world().rank() + 1) % world().size(); }
std::int64_t previous_rank() { return (world().rank() + world().size() - 1) % world().size(); }

/// Posts one message around the ring; the data itself does not matter here.
void post_ring(Receipts& receipts, std::int64_t step, std::int64_t sent, std::int64_t due) {
  std::byte data{};
  const std::array<Outgoing, 1> sends{{{next_rank(), &data, sent}}};
  const std::array<Incoming, 1> receives{{{previous_rank(), &data, due}}};
  receipts.post(step, sends, receives);
}

}  // namespace

TEST_CASE("bytes are those that the sender says it sent, step by step and run by run") {
  Receipts receipts(world());
  for (std::int64_t run = 1; run <= 3; ++run) {
    for (std::int64_t step = 1; step <= 4; ++step) { post_ring(receipts, step, 100 * run + 10 * step + world().rank(), 1); }
    for (std::int64_t step = 4; step >= 1; --step) { CHECK(receipts.received(step) == 100 * run + 10 * step + previous_rank()); }
    CHECK(receipts.received(2) == 100 * run + 20 + previous_rank());
  }
  receipts.drain();
}

TEST_CASE("a run whose receipts nobody asked for does not disturb the next") {
  Receipts receipts(world());
  post_ring(receipts, 1, 5, 5);
  post_ring(receipts, 2, 6, 6);
  post_ring(receipts, 1, 7, 7);
  CHECK(receipts.received(1) == 7);
  CHECK(receipts.received(2) == 6);
  receipts.drain();
}

TEST_CASE("empty messages have no receipt, and a step without messages no bytes") {
  Receipts receipts(world());
  post_ring(receipts, 1, 0, 0);
  CHECK(receipts.received(1) == 0);
  CHECK(receipts.received(9) == 0);
  receipts.drain();
}

TEST_CASE("a peer that is in another step is named") {
  Receipts receipts(world());
  post_ring(receipts, world().rank() == 0 ? 3 : 2, 8, 8);
  const std::int64_t own = world().rank() == 0 ? 3 : 2;
  const std::int64_t others = previous_rank() == 0 ? 3 : 2;
  if (own == others) {
    CHECK(receipts.received(own) == 8);
  } else {
    CHECK_THROWS_WITH(receipts.received(own), "rank " + std::to_string(previous_rank()) + " has sent a message of step " +
                                                  std::to_string(others) + " where one of step " + std::to_string(own) + " was due");
  }
  world().barrier();
}
