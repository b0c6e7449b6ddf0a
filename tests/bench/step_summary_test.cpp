// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/step_summary.hpp>

#include <annulus_test.hpp>

#include <vector>

namespace {

using namespace annulus;
using Timings = std::vector<std::vector<StepTiming>>;

/// compute, communication and exposed milliseconds.
StepTiming timing(double compute, double communication, double exposed) { return {compute, communication, exposed, 0, 0}; }

TEST_CASE("a step's skew is its longest less its shortest compute time, its waits are the longest of any rank") {
  const Timings timings{{timing(5, 0, 0), timing(2, 4, 1)}, {timing(3, 0, 0), timing(7, 1, 3)}, {timing(4, 0, 0), timing(6, 9, 0)}};

  const std::vector<StepSummary> steps = summarize_steps(timings);

  REQUIRE(steps.size() == 2);
  CHECK((steps[0].compute_ms == 5 && steps[0].skew_ms == 2 && steps[0].communication_ms == 0 && steps[0].exposed_ms == 0));
  CHECK((steps[1].compute_ms == 7 && steps[1].skew_ms == 5 && steps[1].communication_ms == 9 && steps[1].exposed_ms == 3));
}

TEST_CASE("a rank without a step computes nothing in it") {
  const Timings timings{{timing(5, 0, 0)}, {timing(3, 0, 0), timing(2, 8, 6)}};

  const std::vector<StepSummary> steps = summarize_steps(timings);

  REQUIRE(steps.size() == 2);
  CHECK((steps[1].compute_ms == 2 && steps[1].skew_ms == 2 && steps[1].communication_ms == 8 && steps[1].exposed_ms == 6));
}

TEST_CASE("the whole run is told by each rank's sums, so that skews of its steps may cancel") {
  const Timings timings{{timing(5, 0, 0), timing(2, 4, 1)}, {timing(3, 0, 0), timing(4, 1, 3)}};

  const StepSummary run = summarize_run(timings);

  CHECK(run.compute_ms == 7);
  CHECK(run.skew_ms == 0);
  CHECK(run.communication_ms == 4);
  CHECK(run.exposed_ms == 3);
}

TEST_CASE("one rank has no skew, and no timings have no steps") {
  CHECK(summarize_run(Timings{{timing(5, 0, 0), timing(2, 4, 1)}}).skew_ms == 0);
  CHECK(summarize_steps(Timings{}).empty());
  CHECK(summarize_run(Timings{}).compute_ms == 0);
}

}  // namespace
