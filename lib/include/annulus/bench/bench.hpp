// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/session.hpp>
#include <annulus/verify/check.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace annulus {

/// What was measured for one configuration. Times are of the slowest rank, milliseconds.
struct BenchReport {
  CaseReport check;  ///< the output that was timed, compared with the oracle first
  std::int64_t repetitions = 0;
  double median_ms = 0;
  double min_ms = 0;
  double p95_ms = 0;
  double blocks_alone_ms = 0;  ///< median of the same blocks without passing; 0 for one rank
  double flops = 0;            ///< 4 * head_dim * visible pairs, all ranks
  double tflops_per_rank = 0;
  double overlap_efficiency = 0;  ///< blocks_alone_ms / median_ms; 0 for one rank
  double peak_gflops = 0;         ///< fp32 FMA peak of this process's threads in the same run; cpu backend only
  double of_peak = 0;
  std::vector<std::vector<StepTiming>> timings;  ///< of the repetition with the median time; rank 0 only
  std::int64_t bytes_received = 0;               ///< of all ranks, one run
};

/// `annulus bench`: warm-up, repetitions, and before them a check of the output. Collective.
/// @throws RuntimeFailure if the output is wrong: a wrong result is not timed
BenchReport bench(const Config& config, const Communicator& comm);

}  // namespace annulus
