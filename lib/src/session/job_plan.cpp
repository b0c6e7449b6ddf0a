// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/job_plan.hpp>

#include <annulus/attention/fused_program.hpp>
#include <annulus/core/error.hpp>
#include <annulus/plan/choice.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

namespace annulus {

namespace {

/// Ranks whose plans are made for nothing but the partials of kernel fused.
constexpr std::int64_t kMostFusedPlans = 64;

/// What the kernel of a resolved configuration takes for partials, by rank of a ring.
class PartialBytes {
 public:
  PartialBytes(const Config& config, const Problem& problem, const Partition& partition)
      : config_(config), problem_(problem), partition_(partition) {
    if (config.kernel != KernelKind::fused || partition.ranks() <= kMostFusedPlans) { return; }
    const std::int64_t ranks = partition.ranks();
    for (const std::int64_t rank : {std::int64_t{0}, ranks / 2, ranks - 1}) { most_fused_ = std::max(most_fused_, fused(rank)); }
  }

  Int128 of(const PlanSizes& sizes) const {
    switch (config_.kernel) {
      case KernelKind::fused:
        // Its partials are of the rows that it carries from step to step, which only the plan tells.
        return partition_.ranks() <= kMostFusedPlans ? fused(sizes.rank) : most_fused_;
      case KernelKind::automatic:
      case KernelKind::cublas:
        break;
    }
    return whole_partials_bytes(problem_, sizes, config_.backend == BackendKind::reference ? 8 : 4);
  }

 private:
  Int128 fused(std::int64_t rank) const {
    return fused_bytes(fused_program(make_plan(problem_, config_.pattern, partition_, routing_of(config_), rank)), problem_.head_dim);
  }

  const Config& config_;
  const Problem& problem_;
  const Partition& partition_;
  Int128 most_fused_ = 0;
};

RankOfJob rank_of_job(const ResolvedConfig& resolved, const Problem& problem, std::int64_t first_rank, const PlanFigures& figures,
                      const PartialBytes& partials) {
  RankOfJob rank;
  rank.rank = first_rank + figures.sizes.rank;
  rank.first_rank = first_rank;
  rank.figures = &figures;
  rank.memory = plan_memory(problem, figures.sizes, partials.of(figures.sizes));
  if (resolved.layer) { rank.layer = layer_cost_of(resolved.config, *resolved.layer, problem, figures.sizes.local_rows); }
  rank.memory_total = rank.memory.total() + rank.layer.activation_bytes + rank.layer.weight_bytes + rank.layer.scratch_bytes;
  rank.flops = figures.cost.flops + rank.layer.flops;
  for (const LinkBytes& link : figures.cost.links) { rank.busiest_link = std::max(rank.busiest_link, link.sent); }
  return rank;
}

/// The first ring of a grid and the last, which may have fewer batch entries or heads.
std::vector<std::int64_t> end_rings(const Grid& grid) {
  if (grid.rings() == 1) { return {0}; }
  return {0, grid.rings() - 1};
}

/// The job of `asked` in one way.
ResolvedConfig resolved_as(Config asked, const JobWay& way) {
  asked.grid = way.grid;
  asked.partition = way.partition;
  asked.schedule = way.schedule;
  return resolve_without_job(std::move(asked));
}

JobWay time_way(const Config& asked, JobWay way, const Machine& machine) {
  try {
    const ResolvedConfig resolved = resolved_as(asked, way);
    way = {resolved.config.places, resolved.config.partition, resolved.config.schedule, predict_job(resolved, machine).total_ms, {}};
  } catch (const InvalidArgument& error) { way.refused = error.what(); }
  return way;
}

bool is_better(const JobWay& a, const JobWay& b) {
  if (a.refused.empty() != b.refused.empty()) { return a.refused.empty(); }
  return a.total_ms < b.total_ms;
}

/// Memory of the rank that needs most among some.
std::int64_t memory_of_some(const ResolvedConfig& resolved) {
  const Config& config = resolved.config;
  const Partition partition(config.partition, config.problem.seq_len, config.places.seq);
  std::int64_t most = 0;
  for (const std::int64_t ring : end_rings(config.places)) {
    const Problem problem = cell_of(config.problem, config.places, ring).problem;
    const PartialBytes partials(config, problem, partition);
    const std::int64_t ranks = partition.ranks();
    const std::vector<std::int64_t> some = ranks == 1 ? std::vector<std::int64_t>{0} : std::vector<std::int64_t>{0, ranks / 2, ranks - 1};
    for_figures_of_some(problem, config.pattern, partition, routing_of(config), some, [&](const PlanFigures& figures) {
      most = std::max(most, rank_of_job(resolved, problem, ring * config.places.seq, figures, partials).memory_total);
    });
  }
  return most;
}

}  // namespace

JobPlan plan_job(const ResolvedConfig& resolved, const Machine* machine, const std::function<void(const RankOfJob&)>& visit) {
  const Config& config = resolved.config;
  const Grid& grid = config.places;
  const Partition partition(config.partition, config.problem.seq_len, grid.seq);
  JobPlan job;
  job.ranks = resolved.ranks;
  for (std::int64_t ring = 0; ring < grid.rings(); ++ring) {
    const Problem problem = cell_of(config.problem, grid, ring).problem;
    const PartialBytes partials(config, problem, partition);
    for_figures_of_ranks(problem, config.pattern, partition, routing_of(config), [&](const PlanFigures& figures) {
      const RankOfJob rank = rank_of_job(resolved, problem, ring * grid.seq, figures, partials);
      if (rank.layer.flops > job.layer_of_largest.flops) { job.layer_of_largest = rank.layer; }
      job.bytes_sent += figures.cost.bytes_sent;
      if (machine != nullptr) {
        for (const LinkBytes& link : figures.cost.links) {
          if (machine->host_of(rank.rank) != machine->host_of(rank.first_rank + link.peer)) { job.bytes_between += link.sent; }
        }
      }
      job.busiest_link = std::max(job.busiest_link, rank.busiest_link);
      job.flops += rank.flops;
      if (rank.memory_total > job.largest_memory) {
        job.largest_memory = rank.memory_total;
        job.largest_rank = rank.rank;
      }
      visit(rank);
    });
  }
  return job;
}

Prediction predict_job(const ResolvedConfig& resolved, const Machine& machine, RankHome home) {
  const Config& config = resolved.config;
  const Partition partition(config.partition, config.problem.seq_len, config.places.seq);
  Prediction slowest;
  std::int64_t interpreted = 0;
  for (const std::int64_t ring : end_rings(config.places)) {
    const Problem problem = cell_of(config.problem, config.places, ring).problem;
    const std::int64_t first_rank = ring * config.places.seq;
    Prediction prediction = predict(problem, config.pattern, partition, routing_of(config), machine, home, first_rank);
    interpreted += prediction.interpreted;
    if (prediction.total_ms < slowest.total_ms) { continue; }
    slowest = std::move(prediction);
    slowest.slowest_rank += first_rank;
  }
  slowest.interpreted = interpreted;
  slowest.ranks = resolved.ranks;
  // In one process they run one after the other.
  if (home == RankHome::one_process) { slowest.total_ms *= static_cast<double>(config.places.rings()); }
  return slowest;
}

double tflops_per_rank(const JobPlan& job, const Prediction& prediction) {
  return job.flops / prediction.total_ms / 1e9 / static_cast<double>(job.ranks);
}

std::vector<JobWay> compare_ways(const Config& asked, const Machine& machine) {
  const ResolvedConfig chosen = resolve_without_job(asked);
  std::vector<JobWay> ways;
  const bool any_grid = asked.grid.automatic || asked.grid == Grid();
  std::vector<Grid> grids{chosen.config.places};
  if (any_grid) {
    for (const Grid& grid : even_grids(chosen.config.problem, chosen.ranks)) {
      const bool allowed = !chosen.config.layer || grid.heads == 1;
      if (allowed && grid != grids.front()) { grids.push_back(grid); }
    }
  }
  for (const Grid& grid : grids) { ways.push_back(time_way(asked, {grid, asked.partition, asked.schedule, 0, {}}, machine)); }
  std::stable_sort(ways.begin(), ways.end(), is_better);
  const JobWay best = ways.front();
  for (const PartitionKind partition : {PartitionKind::contiguous, PartitionKind::zigzag, PartitionKind::striped}) {
    for (const Schedule schedule : {Schedule::ring, Schedule::direct, Schedule::allgather}) {
      // Stripes cut every segment, so where many are short a plan of them is too long to be looked at unasked.
      const bool by_itself = asked.partition == PartitionKind::automatic && partition != PartitionKind::striped;
      const bool asked_for =
          (by_itself || asked.partition == partition) && (asked.schedule == Schedule::automatic || asked.schedule == schedule);
      const bool timed = partition == best.partition && schedule == best.schedule;
      // Without a mask nothing is gained by cutting shards in two.
      const bool senseless = partition == PartitionKind::zigzag && !chosen.config.problem.causal;
      if (asked_for && !timed && !senseless && best.grid.seq > 1) {
        ways.push_back(time_way(asked, {best.grid, partition, schedule, 0, {}}, machine));
      }
    }
  }
  std::stable_sort(ways.begin(), ways.end(), is_better);
  return ways;
}

std::int64_t longest_seq_len(const Config& asked, const ResolvedConfig& resolved, const Machine& machine) {
  ANNULUS_EXPECTS(asked.input.empty(), "the length of an input is the input's");
  constexpr std::int64_t kBlockRows = 256;
  constexpr std::int64_t kMostTokens = std::int64_t{1} << 48;
  const JobWay way{resolved.config.places, resolved.config.partition, resolved.config.schedule, 0, {}};
  const std::int64_t unit = kBlockRows * way.grid.seq;
  const auto fits = [&](std::int64_t units) {
    Config longer = asked;
    longer.problem.seq_len = units * unit;
    longer.problem.kv_lengths.clear();
    try {
      return memory_of_some(resolved_as(std::move(longer), way)) <= machine.memory_bytes;
    } catch (const Error&) { return false; }  // what plans or a kernel's records cannot count does not fit either
  };
  // Memory is nearly in proportion to the length, so the bracket that doubling finds is cut where the proportion says first.
  std::int64_t below = 0;
  std::int64_t above = std::clamp<std::int64_t>(asked.problem.seq_len / unit, 1, kMostTokens / unit);
  while (above < kMostTokens / unit && fits(above)) {
    below = above;
    above = std::min(2 * above, kMostTokens / unit);
  }
  while (above - below > 1) {
    const std::int64_t middle = below + (above - below) / 2;
    (fits(middle) ? below : above) = middle;
    // Closer than a thousandth nobody plans.
    if (above - below <= above / 1024) { break; }
  }
  return below * unit;
}

}  // namespace annulus
