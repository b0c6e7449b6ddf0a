// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/stop_request.hpp>

#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <csignal>

using namespace annulus;

namespace {

bool is_last_rank() { return test::world().rank() == test::world().size() - 1; }

}  // namespace

TEST_CASE("a signal that one rank has got stops all of them, and for good") {
  for (const auto& [signal, cause] : {std::pair{SIGUSR1, StopCause::user_signal}, std::pair{SIGTERM, StopCause::termination}}) {
    StopRequest stop;
    stop.heed_signals();
    REQUIRE_FALSE(stop.agreed(test::world()));
    CHECK(stop.cause() == StopCause::none);

    const bool taken = !is_last_rank() || take_stop_signal(signal);

    CHECK(taken);
    CHECK(stop.agreed(test::world()));
    CHECK(stop.agreed(test::world()));
    CHECK(stop.cause() == cause);
  }
}

TEST_CASE("ranks that got different signals name the same one") {
  StopRequest stop;
  stop.heed_signals();
  CHECK(take_stop_signal(is_last_rank() ? SIGTERM : SIGUSR1));

  REQUIRE(stop.agreed(test::world()));

  CHECK(stop.cause() == StopCause::termination);
  CHECK(describe(stop.cause()) == "SIGTERM");
}

TEST_CASE("the time limit of one rank stops all of them") {
  StopRequest stop;
  stop.set_limit(is_last_rank() ? 1e-9 : 1e6);

  CHECK(stop.agreed(test::world()));

  CHECK(stop.cause() == StopCause::time_limit);
}

TEST_CASE("without a limit nothing stops a job") {
  StopRequest stop;
  stop.set_limit(0);

  CHECK_FALSE(stop.agreed(test::world()));
}

TEST_CASE("a signal is taken only while it is heeded, and SIGTERM once") {
  CHECK_FALSE(take_stop_signal(SIGTERM));
  {
    StopRequest stop;
    CHECK_FALSE(take_stop_signal(SIGUSR1));
    stop.heed_signals();
    CHECK(take_stop_signal(SIGUSR1));
    CHECK(take_stop_signal(SIGUSR1));
    CHECK(take_stop_signal(SIGTERM));
    CHECK_FALSE(take_stop_signal(SIGTERM));
    CHECK_FALSE(take_stop_signal(SIGINT));
  }
  CHECK_FALSE(take_stop_signal(SIGUSR1));

  StopRequest next;
  next.heed_signals();
  CHECK_FALSE(next.agreed(test::world()));
}
