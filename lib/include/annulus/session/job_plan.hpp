// SPDX-License-Identifier: Apache-2.0
// What a job comes to before it runs: memory, traffic, work, and on a known machine its time.
#pragma once

#include <annulus/attention/layer_executor.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/predict.hpp>
#include <annulus/session/session.hpp>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace annulus {

/// One rank of the job.
struct RankOfJob {
  std::int64_t rank = 0;        ///< in the job
  std::int64_t first_rank = 0;  ///< of its ring, in the job: peers in `figures` count from it
  const PlanFigures* figures = nullptr;
  MemoryPlan memory;              ///< of the attention
  LayerCost layer;                ///< around it
  std::int64_t memory_total = 0;  ///< of both
  double flops = 0;               ///< of both
  Int128 busiest_link = 0;        ///< most bytes that it sends to one rank
};

/// The job as a whole.
struct JobPlan {
  std::int64_t ranks = 1;
  Int128 bytes_sent = 0;
  Int128 bytes_between = 0;  ///< of them, from host to host; 0 without a machine
  Int128 busiest_link = 0;   ///< most bytes from one rank to another
  double flops = 0;
  std::int64_t largest_memory = 0;
  std::int64_t largest_rank = 0;  ///< whose memory that is
  LayerCost layer_of_largest;
};

/// Counts the job, and calls visit(rank) for each of its ranks, ascending. Partials of kernel fused are known of a plan alone; of more
/// than 64 ranks they are those of the rank that has most among some of every ring.
/// @param machine  says which ranks share a host; may be null
/// @throws InvalidArgument as make_plan() and plan_memory()
JobPlan plan_job(const ResolvedConfig& resolved, const Machine* machine, const std::function<void(const RankOfJob&)>& visit);

/// The time of the job, without a layer around its attention. Rings of a grid need nothing of each other; their first and their last are
/// simulated.
/// @throws InvalidArgument as predict()
Prediction predict_job(const ResolvedConfig& resolved, const Machine& machine, RankHome home = RankHome::processes);

/// The rate of a rank at the predicted time, with the work of a layer in it if there is one.
double tflops_per_rank(const JobPlan& job, const Prediction& prediction);

/// A way of running a job.
struct JobWay {
  Grid grid;
  PartitionKind partition = PartitionKind::contiguous;
  Schedule schedule = Schedule::ring;
  double total_ms = 0;
  std::string refused;  ///< why it cannot be; empty if it can
};

/// Ways of running the job, the fastest first and those that cannot be last: with the partition and schedule that `auto` takes, the even
/// grids; with the grid that is then the fastest, all partitions and schedules.
/// @param asked  as given, before it is resolved
std::vector<JobWay> compare_ways(const Config& asked, const Machine& machine);

/// The longest sequence whose job fits in the machine's memory, in whole blocks of 256 rows for each rank of a ring; 0 if not even one of
/// them fits. Of the resolved grid, partition and schedule; branches keep their segment lengths.
/// @param asked  as given, before it is resolved; without an input
std::int64_t longest_seq_len(const Config& asked, const ResolvedConfig& resolved, const Machine& machine);

}  // namespace annulus
