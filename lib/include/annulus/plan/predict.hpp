// SPDX-License-Identifier: Apache-2.0
// The time of a ring of any number of ranks, from as many of their plans as it takes.
#pragma once

#include <annulus/plan/simulate.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// Whether ranks have processes of their own or share one.
enum class RankHome { processes, one_process };

struct Prediction {
  double total_ms = 0;  ///< of the slowest rank, as are the others
  double compute_ms = 0;
  double exposed_ms = 0;
  double communication_ms = 0;  ///< the steps' transfers, from post to completion
  std::int64_t slowest_rank = 0;
  std::vector<StepTiming> steps;  ///< of the slowest rank
  std::int64_t interpreted = 0;   ///< ranks whose plans were run on the clock
  std::int64_t ranks = 0;
};

/// Simulates the ranks' plans. Where they would be more than a few megabytes, the plans of some ranks are run, each among equals (see
/// simulate_among_equals()): the first and the last of the ring, those in the middle, and those in the middle of these.
/// @param first_rank  of the ring, in the job: which ranks share a host
/// @throws InvalidArgument as make_plan() and simulate()
Prediction predict(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing,
                   const Machine& machine, RankHome home = RankHome::processes, std::int64_t first_rank = 0);

}  // namespace annulus
