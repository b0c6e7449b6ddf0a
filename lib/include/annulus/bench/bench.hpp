// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/bench/step_summary.hpp>
#include <annulus/job/stop_request.hpp>
#include <annulus/plan/machine.hpp>
#include <annulus/session/check.hpp>
#include <annulus/session/session.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace annulus {

/// What was measured for one configuration. Times are of the slowest rank, milliseconds.
struct BenchReport {
  Config config;                   ///< as it ran: shapes, dtype and scale of the input, the transport and threads that were taken
  std::int64_t ranks = 1;          ///< of the ring: processes, or virtual ranks
  std::string backend;             ///< this process's AttentionKernel::describe()
  std::string input;               ///< TensorSource::describe()
  CaseReport check;                ///< the output that was timed, compared with the oracle first
  std::vector<double> samples_ms;  ///< one for each repetition, in order
  double median_ms = 0;
  double min_ms = 0;
  double p95_ms = 0;
  double blocks_alone_ms = 0;           ///< median of the same blocks without passing; 0 for one rank
  double flops = 0;                     ///< 4 * head_dim * visible pairs, all ranks; with gradients 10 * head_dim * visible pairs more
  double backward_ms = 0;               ///< median of the backward passes alone; 0 without gradients
  double backward_tflops_per_rank = 0;  ///< 10 * head_dim * visible pairs in that time
  double tflops_per_rank = 0;
  double overlap_efficiency = 0;  ///< blocks_alone_ms / median_ms; 0 for one rank
  double fma_peak_gflops = 0;     ///< fp32 FMA peak of this process's threads, after the runs; cpu backend only
  double product_tflops = 0;      ///< rate of a plain 16-bit product of cuBLAS, after the runs; 0 for fp32 and on a CPU
  double of_peak = 0;             ///< share of whichever of the two there is
  double predicted_ms = 0;        ///< by the simulator, with the constants of a machine; 0 without one
  double prediction_error = 0;    ///< predicted_ms / median_ms - 1
  double of_cycles = 0;           ///< share of what the tensor cores could have done in the clock cycles of a run more; kernel fused only
  std::vector<std::vector<StepTiming>> timings;  ///< [rank][step] of the repetition with the (lower) median time; rank 0 only
  std::vector<StepSummary> steps;                ///< of `timings`, over the ranks
  StepSummary run;                               ///< the same of the whole run
  std::int64_t bytes_received = 0;               ///< of all ranks, one run
  std::int64_t memory_high_water = 0;            ///< bytes of the process that held most
};

/// Sets the configuration up as bench() does, with the memory it needs, and lets go of it again: finds all that can be found without
/// running. Collective.
/// @param plans  where plans are found and kept
/// @throws AgreedError as resolve() and Session
void require_runnable(const Config& config, const Communicator& comm, PlanCache& plans);

/// One row of `annulus bench`: warm-up, repetitions, and before them a check of the output. All memory is free again at return. Collective.
/// @param plans  where plans are found and kept
/// @param stop     asked before the row and before each repetition
/// @param machine  predicts the row's time; null: nothing does. Read on rank 0 alone
/// @return nothing if the job is to stop: a row is measured as a whole or not at all
/// @throws AgreedError as resolve() and Session, and with code runtime_failure if the output is wrong: a wrong result is not timed
std::optional<BenchReport> bench(const Config& config, const Communicator& comm, PlanCache& plans, StopRequest& stop,
                                 const Machine* machine = nullptr);

}  // namespace annulus
