// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/predict.hpp>

#include <annulus/core/error.hpp>

#include "routes/walk.hpp"
#include "setting.hpp"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>

namespace annulus {

namespace {

using planning::Setting;
using planning::Walk;

/// Work items, blocks and messages of all plans together that are worth their memory: about 100 MB.
constexpr std::int64_t kMostEntries = std::int64_t{1} << 17;

std::int64_t entries_of(const RingPlan& plan) {
  std::int64_t entries = std::ssize(plan.blocks) + std::ssize(plan.steps);
  for (const Step& step : plan.steps) { entries += std::ssize(step.work); }
  return entries;
}

/// The first rank, the last, and some between them. They differ in how much a mask hides from them, and the ends in what passes hosts.
std::vector<std::int64_t> some_ranks(std::int64_t ranks) {
  std::set<std::int64_t> some;
  for (const std::int64_t quarter : {4, 0, 2, 1, 3}) { some.insert(std::min(ranks - 1, ranks * quarter / 4)); }
  return {some.begin(), some.end()};
}

/// What the senders of a rank's messages send in the same step, under a schedule in which owners send.
class BusySenders {
 public:
  explicit BusySenders(const Setting& setting) : setting_(setting) {}

  /// [step][receive]
  std::vector<std::vector<double>> of(const RingPlan& plan) {
    std::vector<std::vector<double>> busy;
    for (std::int64_t step = 0; step < std::ssize(plan.steps); ++step) {
      double sent = 0;
      for (const Message& message : plan.steps[step].sends) { sent += static_cast<double>(message.bytes); }
      std::vector<double>& of_step = busy.emplace_back();
      for (const Message& message : plan.steps[step].receives) {
        double bytes = 0;
        for (const std::int64_t block : message.blocks) { bytes += bytes_of(plan.blocks[block], plan.rank); }
        // Of a ring, whose ranks pass on what they get, a sender sends what this rank sends.
        of_step.push_back(owners_send() ? bytes : std::max(sent, static_cast<double>(message.bytes)));
      }
    }
    return busy;
  }

 private:
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

  bool owners_send() const {
    switch (setting_.routing.schedule) {
      case Schedule::direct:
      case Schedule::allgather:
        return true;
      case Schedule::ring:
      case Schedule::ring_full:
      case Schedule::automatic:
        break;
    }
    return false;
  }

  /// What the sender has sent when the block has come to `rank`: under allgather to all that need it, under direct to half of those that
  /// take it in the same step, as each of them is served when it comes to the step.
  double bytes_of(const KvBlock& block, std::int64_t rank) {
    if (!owners_send()) { return 0; }
    // Extra keys go to all ranks at once, wherever their rows are.
    if (block.branch < 0) { return static_cast<double>(block.bytes) * static_cast<double>(setting_.partition.ranks()) / 2; }
    const Key key{block.branch, block.head_class, block.segment};
    auto found = walks_.find(key);
    if (found == walks_.end()) {
      found =
          walks_.emplace(key, Walk(setting_, block.branch, block.segment, setting_.rows_of(block.branch, block.head_class, block.segment)))
              .first;
    }
    const Walk& walk = found->second;
    const Walk::Member* const self = walk.member(rank);
    ANNULUS_ASSERT(self != nullptr, "rank {} gets a block of a segment in which it has no rows", rank);
    const std::int64_t number = number_of(walk, block);
    const bool gathers = setting_.routing.schedule == Schedule::allgather;
    const std::int64_t step = walk.step(*self, number);
    std::int64_t takers = 0;
    for (const Walk::Member& member : walk.members()) {
      if (walk.needs(member, number) && (gathers || walk.step(member, number) == step)) { ++takers; }
    }
    const double sent = gathers ? static_cast<double>(takers) : static_cast<double>(takers + 1) / 2;
    return sent * static_cast<double>(block.bytes);
  }

  static std::int64_t number_of(const Walk& walk, const KvBlock& block) {
    const Walk::Member* const owner = walk.member(block.owner);
    const bool lower = owner->lower >= 0 && walk.part(owner->lower).rows == block.rows_global;
    return lower ? owner->lower : owner->upper;
  }

  const Setting& setting_;
  std::map<Key, Walk> walks_;
};

Prediction of_slowest(const std::vector<std::int64_t>& ranks, const std::vector<double>& rank_ms,
                      std::vector<std::vector<StepTiming>> timings) {
  const auto slowest = static_cast<std::size_t>(std::max_element(rank_ms.begin(), rank_ms.end()) - rank_ms.begin());
  Prediction prediction;
  prediction.total_ms = rank_ms[slowest];
  prediction.slowest_rank = ranks[slowest];
  prediction.steps = std::move(timings[slowest]);
  prediction.interpreted = std::ssize(ranks);
  for (const StepTiming& step : prediction.steps) {
    prediction.compute_ms += step.compute_ms;
    prediction.exposed_ms += step.exposed_ms;
    prediction.communication_ms += step.communication_ms;
  }
  return prediction;
}

}  // namespace

Prediction predict(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing,
                   const Machine& machine, RankHome home, std::int64_t first_rank) {
  ANNULUS_EXPECTS(!routing.gradients,
                  "the time of a backward pass is not predicted: --gradients without --machine plans memory and traffic");
  const std::int64_t ranks = partition.ranks();
  const std::vector<std::int64_t> some = some_ranks(ranks);
  std::vector<RingPlan> plans;
  std::int64_t entries = 0;
  for (const std::int64_t rank : some) {
    plans.push_back(make_plan(problem, pattern, partition, routing, rank));
    entries = std::max(entries, entries_of(plans.back()));
  }
  Prediction prediction;
  if (home == RankHome::one_process || entries <= kMostEntries / ranks) {
    plans.clear();
    std::vector<std::int64_t> all;
    for (std::int64_t rank = 0; rank < ranks; ++rank) {
      all.push_back(rank);
      plans.push_back(make_plan(problem, pattern, partition, routing, rank));
    }
    const bool shared = home == RankHome::one_process && ranks > 1;
    Simulation simulation = shared ? simulate_virtual_ranks(plans, machine) : simulate(plans, machine, first_rank);
    prediction = of_slowest(all, simulation.rank_ms, std::move(simulation.timings));
    prediction.total_ms = simulation.total_ms;
  } else {
    const Setting setting = planning::make_setting(problem, pattern, partition, routing, 0);
    BusySenders senders(setting);
    std::vector<double> rank_ms;
    std::vector<std::vector<StepTiming>> timings;
    for (const RingPlan& plan : plans) {
      Simulation simulation = simulate_among_equals(plan, senders.of(plan), machine, first_rank);
      rank_ms.push_back(simulation.total_ms);
      timings.push_back(std::move(simulation.timings.front()));
    }
    prediction = of_slowest(some, rank_ms, std::move(timings));
  }
  prediction.ranks = ranks;
  return prediction;
}

}  // namespace annulus
