// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/choice.hpp>

#include <annulus/core/error.hpp>
#include <annulus/pattern/grid_cell.hpp>
#include <annulus/plan/cost.hpp>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

namespace annulus {

namespace {

/// Work of the busiest rank, in units of the ranks' mean.
double busiest_share(const Problem& problem, const Pattern& pattern, PartitionKind kind, std::int64_t ranks) {
  const std::vector<Int128> pairs = pairs_of_ranks(problem, pattern, Partition(kind, problem.seq_len, ranks));
  const Int128 all = std::accumulate(pairs.begin(), pairs.end(), Int128{0});
  const Int128 most = *std::max_element(pairs.begin(), pairs.end());
  return all == 0 ? 1.0 : static_cast<double>(most) * static_cast<double>(ranks) / static_cast<double>(all);
}

/// Above this share of the busiest sender, blocks that are passed on from neighbour to neighbour arrive sooner than those that all ask one
/// rank for: on hosts of 8 GPUs with a 400 Gb/s card each, simulated, direct hides its messages at 1 Mi tokens with 16 ranks (5.9) and not
/// with 32 (11); at 128 Ki tokens it loses a quarter with 16, two thirds with 32.
constexpr double kMostOfBusiestSender = 8;

/// Whether a causal zigzag goes with the schedule without losing the order of keys.
bool allows_zigzag(Schedule schedule) { return schedule == Schedule::automatic || keeps_key_order(PartitionKind::zigzag, schedule, true); }

struct PartitionChoice {
  PartitionKind kind = PartitionKind::contiguous;
  std::string reason;
};

PartitionChoice choose_partition(const Problem& problem, const Pattern& pattern, PartitionKind asked, Schedule schedule,
                                 std::int64_t ranks) {
  if (asked != PartitionKind::automatic) { return {asked, {}}; }
  if (ranks == 1) { return {PartitionKind::contiguous, "one rank"}; }
  if (!problem.causal) { return {PartitionKind::contiguous, "no mask"}; }
  if (!allows_zigzag(schedule)) { return {PartitionKind::contiguous, "this schedule has its order of keys there"}; }
  const double contiguous = busiest_share(problem, pattern, PartitionKind::contiguous, ranks);
  const double zigzag = busiest_share(problem, pattern, PartitionKind::zigzag, ranks);
  // It costs messages and cuts segments, so a little balance is not worth it.
  return {zigzag * 1.2 < contiguous ? PartitionKind::zigzag : PartitionKind::contiguous,
          fmt::format("the busiest rank does {:.2f} of the mean work with contiguous, {:.2f} with zigzag", contiguous, zigzag)};
}

/// Visible pairs of the busiest rank.
Int128 busiest_pairs(const Grid& grid, const Problem& problem, const Pattern& pattern, PartitionKind partition, Schedule schedule) {
  Int128 most = 0;
  for (std::int64_t ring = 0; ring < grid.rings(); ++ring) {
    const Problem cell = cell_of(problem, grid, ring).problem;
    const PartitionKind kind = choose_partition(cell, pattern, partition, schedule, grid.seq).kind;
    for (const Int128 pairs : pairs_of_ranks(cell, pattern, Partition(kind, cell.seq_len, grid.seq))) { most = std::max(most, pairs); }
  }
  return most;
}

/// Whether heads can be cut in so many parts of equal numbers.
bool cuts_evenly(const Problem& problem, std::int64_t parts) {
  return problem.kv_heads % parts == 0 || (parts % problem.kv_heads == 0 && problem.heads % parts == 0);
}

}  // namespace

std::vector<Grid> even_grids(const Problem& problem, std::int64_t ranks) {
  std::vector<Grid> grids;
  for (std::int64_t batch = std::gcd(ranks, problem.batch); batch >= 1; --batch) {
    if (problem.batch % batch != 0 || ranks % batch != 0) { continue; }
    for (std::int64_t heads = std::min(ranks / batch, problem.heads); heads >= 1; --heads) {
      if (ranks / batch % heads == 0 && cuts_evenly(problem, heads)) { grids.push_back({batch, heads, ranks / batch / heads}); }
    }
  }
  std::stable_sort(grids.begin(), grids.end(), [](const Grid& a, const Grid& b) { return a.rings() > b.rings(); });
  return grids;
}

GridChoice choose_grid(const Grid& asked, const Problem& problem, const Pattern& pattern, PartitionKind partition, Schedule schedule,
                       std::int64_t ranks) {
  if (!asked.automatic) { return {resolve_grid(asked, problem, ranks), {}}; }
  // Cells of other sizes than their neighbours' cannot be balanced, so only parts that divide what they cut come in question.
  const std::vector<Grid> grids = even_grids(problem, ranks);
  std::vector<Int128> busiest;
  for (const Grid& grid : grids) { busiest.push_back(busiest_pairs(grid, problem, pattern, partition, schedule)); }
  const Int128 least = *std::min_element(busiest.begin(), busiest.end());
  // Within what a plain ring would lose by its transfers.
  const auto balanced = std::find_if(busiest.begin(), busiest.end(), [&](Int128 pairs) { return 50 * pairs <= 51 * least; });
  return {grids[static_cast<std::size_t>(balanced - busiest.begin())],
          fmt::format("the most rings of {} even grids that give no rank more work", grids.size())};
}

Ways choose_ways(const Problem& problem, const Pattern& pattern, PartitionKind partition, Schedule schedule, std::int64_t ranks) {
  PartitionChoice chosen = choose_partition(problem, pattern, partition, schedule, ranks);
  Ways ways{chosen.kind, schedule, std::move(chosen.reason)};
  if (schedule != Schedule::automatic) { return ways; }
  ways.schedule = Schedule::ring;
  const auto because = [&](const std::string& reason) { ways.reason += (ways.reason.empty() ? "" : "; ") + reason; };
  if (!problem.causal || ways.partition != PartitionKind::zigzag) {
    if (ways.reason.empty()) { because("blocks travel between neighbours alone"); }
    return ways;
  }
  const double share = busiest_sender_share(problem, pattern, Partition(ways.partition, problem.seq_len, ranks));
  if (share <= kMostOfBusiestSender) {
    ways.schedule = Schedule::direct;
    if (ways.reason.empty()) { because("it keeps the order of keys"); }
    return ways;
  }
  because(fmt::format("with direct the busiest sender of a step would send {:.1f} times the mean", share));
  return ways;
}

}  // namespace annulus
