// SPDX-License-Identifier: Apache-2.0
// What the ranks' timings say of each step of the ring and of the whole run.
#pragma once

#include <annulus/core/step_timing.hpp>

#include <span>
#include <vector>

namespace annulus {

/// One step over all ranks, milliseconds. A rank whose plan has no such step counts with 0.
struct StepSummary {
  double compute_ms = 0;        ///< of the rank that computes longest
  double skew_ms = 0;           ///< that, less the compute time of the rank that computes shortest
  double communication_ms = 0;  ///< longest time from post to completion
  double exposed_ms = 0;        ///< longest wait for the step's messages
};

/// Steps 0 and up. @param timings [rank][step]
std::vector<StepSummary> summarize_steps(std::span<const std::vector<StepTiming>> timings);

/// The same figures for the whole run: of each rank's sums over its steps.
StepSummary summarize_run(std::span<const std::vector<StepTiming>> timings);

}  // namespace annulus
