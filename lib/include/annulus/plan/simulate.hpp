// SPDX-License-Identifier: Apache-2.0
// Runs plans on a simulated clock, op by op, with the constants of a machine.
#pragma once

#include <annulus/core/step_timing.hpp>
#include <annulus/plan/machine.hpp>
#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace annulus {

/// What a simulated run took, as a measured one is told.
struct Simulation {
  std::vector<std::vector<StepTiming>> timings;  ///< [rank][step]; times count from the rank's post of step 1
  std::vector<double> rank_ms;                   ///< from the common begin to the rank's end
  double total_ms = 0;                           ///< of the slowest rank
};

/// The plans of all ranks of a ring (plans[i] is rank i's), each rank with a clock, a port out and a port in. A message starts when both
/// ends have posted it and both ports are free (Transfers::in_wait: and its receiver waits), those that were posted earlier first; a rank
/// waits for what it receives and what it sends. Virtual ranks take turns on one clock, as in one process: in_wait, which processors are,
/// a message is copied when it is posted.
/// @param first_rank  of the ring, in the job: which ranks share a host
/// @throws InvalidArgument if the machine lacks a constant that the plans need
Simulation simulate(std::span<const RingPlan> plans, const Machine& machine, std::int64_t first_rank = 0);
Simulation simulate_virtual_ranks(std::span<const RingPlan> plans, const Machine& machine);

/// The plan of one rank among many, whose peers are taken to come to every step when it does: right where ranks have the same work.
/// @param busy_bytes  [step][receive]: what the sender of a message sends in the step to anybody, at least the message
Simulation simulate_among_equals(const RingPlan& plan, const std::vector<std::vector<double>>& busy_bytes, const Machine& machine,
                                 std::int64_t first_rank = 0);

}  // namespace annulus
