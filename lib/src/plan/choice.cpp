// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/choice.hpp>

#include <annulus/core/error.hpp>
#include <annulus/plan/cost.hpp>

#include <algorithm>
#include <numeric>
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

/// Whether a causal zigzag goes with the schedule without losing the order of keys.
bool allows_zigzag(Schedule schedule) { return schedule == Schedule::automatic || keeps_key_order(PartitionKind::zigzag, schedule, true); }

}  // namespace

Ways choose_ways(const Problem& problem, const Pattern& pattern, PartitionKind partition, Schedule schedule, std::int64_t ranks) {
  Ways ways{partition, schedule, {}};
  if (partition == PartitionKind::automatic) {
    ways.partition = PartitionKind::contiguous;
    ways.reason = ranks == 1 ? "one rank" : problem.causal ? "this schedule has its order of keys there" : "no mask";
    if (problem.causal && ranks > 1 && allows_zigzag(schedule)) {
      const double contiguous = busiest_share(problem, pattern, PartitionKind::contiguous, ranks);
      const double zigzag = busiest_share(problem, pattern, PartitionKind::zigzag, ranks);
      // It costs messages and cuts segments, so a little balance is not worth it.
      if (zigzag * 1.2 < contiguous) { ways.partition = PartitionKind::zigzag; }
      ways.reason = fmt::format("the busiest rank does {:.2f} of the mean work with contiguous, {:.2f} with zigzag", contiguous, zigzag);
    }
  }
  if (schedule == Schedule::automatic) {
    const bool walks_apart = problem.causal && ways.partition == PartitionKind::zigzag;
    ways.schedule = walks_apart ? Schedule::direct : Schedule::ring;
    if (ways.reason.empty()) { ways.reason = walks_apart ? "it keeps the order of keys" : "blocks travel between neighbours alone"; }
  }
  return ways;
}

}  // namespace annulus
