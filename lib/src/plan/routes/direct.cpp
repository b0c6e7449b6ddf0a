// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>

#include "routes.hpp"

#include <algorithm>
#include <map>
#include <utility>

namespace annulus::planning {

namespace {

/// Rows of one segment that lie in one piece of the sequence.
struct Part {
  std::int64_t rank = 0;
  Progression rows;
};

/// The parts of a segment in the order of the sequence, and how the ranks that own them walk over them.
class Walk {
 public:
  Walk(const Setting& setting, std::int64_t branch, std::int64_t segment, const Progression& rows) : causal_(setting.problem.causal) {
    for (const Member& member : members_of(setting, branch, segment, rows)) {
      for (const Progression& owned : member.owned) { parts_.push_back({member.rank, owned}); }
    }
    std::sort(parts_.begin(), parts_.end(), [](const Part& a, const Part& b) { return a.rows.first < b.rows.first; });
    for (std::int64_t part = 0; part < std::ssize(parts_); ++part) { own_[parts_[static_cast<std::size_t>(part)].rank].push_back(part); }
  }

  const Part& part(std::int64_t number) const { return parts_[static_cast<std::size_t>(number)]; }
  std::int64_t parts() const { return std::ssize(parts_); }
  /// Parts of each rank that has some, ascending: one or two.
  const std::map<std::int64_t, std::vector<std::int64_t>>& own() const { return own_; }

  bool needs(std::int64_t rank, std::int64_t number) const {
    return part(number).rank != rank && (!causal_ || number < own_.at(rank).back());
  }

  /// The step in which queries of `rank` first meet part `number`, which it needs. Under a causal mask they walk down from the rank's upper
  /// part, a step for each piece of queries that a part meets, own keys included; else once round, a step for each part of others.
  std::int64_t step(std::int64_t rank, std::int64_t number) const {
    const std::vector<std::int64_t>& own = own_.at(rank);
    const std::int64_t upper = own.back();
    const std::int64_t lower = own.size() > 1 ? own.front() : -1;
    if (causal_) { return upper - number + (number < lower ? lower - 1 - number : 0); }
    const auto down = [&](std::int64_t to) { return (upper - to + parts()) % parts(); };
    return down(number) - (lower >= 0 && down(lower) < down(number) ? 1 : 0);
  }

 private:
  bool causal_;
  std::vector<Part> parts_;
  std::map<std::int64_t, std::vector<std::int64_t>> own_;
};

/// Adds the blocks of one segment and head class.
void route_segment(Routes& routes, const Setting& setting, std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
  const Walk walk(setting, branch, segment, setting.rows_of(branch, head_class, segment));
  const auto self = walk.own().find(setting.rank);
  if (self == walk.own().end()) { return; }
  const bool gathers = setting.routing.schedule == Schedule::allgather;
  const auto step_of = [&](std::int64_t rank, std::int64_t number) { return gathers ? 1 : walk.step(rank, number); };
  const auto block_of = [&](std::int64_t number) {
    const Part& part = walk.part(number);
    return add_block(routes, setting.problem,
                     {branch, head_class, segment, part.rank, Rows<Global>(part.rows), setting.heads(branch, head_class).kv, 0});
  };

  // Two pieces of the shard walk apart under a causal mask.
  const std::vector<std::int64_t>& own = self->second;
  const bool apart = setting.problem.causal && own.size() > 1;
  const bool keeps_order = setting.routing.key_order == KeyOrder::cyclic;
  bool met_own = !apart || !keeps_order;
  const auto meet_own = [&] {
    routes.uses.push_back({gathers ? 1 : own.back() - own.front(), -1, branch, head_class, segment});
    met_own = true;
  };
  // Blocks in the order of the sequence, in which the sender lists them too; queries meet them in the order of the walk.
  struct Needed {
    std::int64_t number;
    std::int64_t block;
  };
  std::vector<Needed> needed;
  for (std::int64_t number = 0; number < walk.parts(); ++number) {
    if (!walk.needs(setting.rank, number)) { continue; }
    needed.push_back({number, block_of(number)});
    routes.receives.push_back({needed.back().block, step_of(setting.rank, number), walk.part(number).rank});
  }
  std::sort(needed.begin(), needed.end(),
            [&](const Needed& a, const Needed& b) { return walk.step(setting.rank, a.number) < walk.step(setting.rank, b.number); });
  for (const auto& [number, block] : needed) {
    if (!met_own && number < own.front()) { meet_own(); }
    const std::int64_t step = step_of(setting.rank, number);
    const bool in_two_steps = apart && number < own.front() && !gathers;
    routes.uses.push_back({step, block});
    if (in_two_steps) {
      routes.uses.back().q_piece = 1;
      routes.uses.push_back({step + 1, block});
      routes.uses.back().q_piece = 0;
    }
  }
  if (!met_own) { meet_own(); }

  for (const std::int64_t number : own) {
    std::int64_t block = -1;
    for (const auto& [rank, parts] : walk.own()) {
      if (!walk.needs(rank, number)) { continue; }
      if (block < 0) { block = block_of(number); }
      routes.sends.push_back({block, step_of(rank, number), rank});
    }
  }
}

}  // namespace

Routes direct_routes(const Setting& setting) {
  Routes routes;
  for_each_cut_segment(setting, [&](std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
    route_segment(routes, setting, branch, head_class, segment);
  });
  return routes;
}

}  // namespace annulus::planning
