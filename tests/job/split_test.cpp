// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/communicator.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <cstdint>
#include <string>
#include <vector>

using namespace annulus;
using annulus::test::contains_text;
using annulus::test::world;

TEST_CASE("ranks that give the same part find each other, in their order, and know who they are in the job") {
  const std::int64_t part = world().rank() % 2;
  const Communicator some = world().split(part);

  CHECK(some.size() == (world().size() + 1 - part) / 2);
  CHECK(some.rank() == world().rank() / 2);
  for (std::int64_t rank = 0; rank < some.size(); ++rank) { CHECK(some.rank_in_job(rank) == 2 * rank + part); }
  CHECK(some.rank_in_job(-1) == -1);
  CHECK(some.name() == world().name());
  CHECK(some.sum(world().rank()) == some.size() * (some.size() - 1) + part * some.size());
  CHECK(some.host_size() == some.size());  // tests run on one host
  CHECK(some.host_rank() == some.rank());
  CHECK(static_cast<std::int64_t>(some.host_ranks().size()) == some.size());

  const Communicator alone = some.split(some.rank());
  CHECK(alone.size() == 1);
  CHECK(alone.rank_in_job(0) == world().rank());
  CHECK(alone.duplicate().rank_in_job(0) == world().rank());
}

TEST_CASE("a wait for a rank of a part is a wait for that rank of the job") {
  const std::int64_t part = world().rank() % 2;
  const Communicator some = world().split(part);
  const Watchdog::Wait wait = some.waiting("receiving", some.size() - 1, 64);

  const std::string peer = std::to_string(2 * (some.size() - 1) + part);
  CHECK_THAT(world().watchdog().describe(), contains_text("receiving with rank " + peer + " (64 bytes)"));
}

TEST_CASE("what a part agrees on, the job can agree on too") {
  const Communicator some = world().split(world().rank() % 2);
  std::string told;
  try {
    together(world(), [&] {
      together(some, [&] {
        if (world().rank() == 1) { throw InvalidArgument("rank 1 fails"); }
      });
    });
  } catch (const AgreedError& error) { told = error.what(); }

  CHECK(told == "rank 1 fails");
}
