// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>

#include "routes.hpp"
#include "walk.hpp"

#include <algorithm>
#include <utility>

namespace annulus::planning {

namespace {

/// Adds the blocks of one segment and head class.
void route_segment(Routes& routes, const Setting& setting, std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
  const Walk walk(setting, branch, segment, setting.rows_of(branch, head_class, segment));
  const Walk::Member* const self = walk.member(setting.rank);
  if (self == nullptr) { return; }
  const bool gathers = setting.routing.schedule == Schedule::allgather;
  const auto step_of = [&](const Walk::Member& member, std::int64_t number) { return gathers ? 1 : walk.step(member, number); };
  const auto block_of = [&](std::int64_t number) {
    const Walk::Part& part = walk.part(number);
    return add_block(routes, setting.problem, {branch, head_class, segment, part.rank, part.rows, setting.heads(branch, head_class).kv, 0});
  };

  // Two pieces of the shard walk apart under a causal mask.
  const bool apart = setting.problem.causal && self->lower >= 0;
  const bool keeps_order = setting.routing.key_order == KeyOrder::cyclic;
  bool met_own = !apart || !keeps_order;
  const auto meet_own = [&] {
    routes.uses.push_back({gathers ? 1 : self->upper - self->lower, -1, branch, head_class, segment});
    met_own = true;
  };
  // Blocks in the order of the sequence, in which the sender lists them too; queries meet them in the order of the walk.
  struct Needed {
    std::int64_t number;
    std::int64_t block;
  };
  std::vector<Needed> needed;
  for (std::int64_t number = 0; number < walk.parts(); ++number) {
    if (!walk.needs(*self, number)) { continue; }
    needed.push_back({number, block_of(number)});
    routes.receives.push_back({needed.back().block, step_of(*self, number), walk.part(number).rank});
  }
  std::sort(needed.begin(), needed.end(),
            [&](const Needed& a, const Needed& b) { return walk.step(*self, a.number) < walk.step(*self, b.number); });
  for (const auto& [number, block] : needed) {
    if (!met_own && number < self->lower) { meet_own(); }
    const std::int64_t step = step_of(*self, number);
    const bool in_two_steps = apart && number < self->lower && !gathers;
    routes.uses.push_back({step, block});
    if (in_two_steps) {
      routes.uses.back().q_piece = 1;
      routes.uses.push_back({step + 1, block});
      routes.uses.back().q_piece = 0;
    }
  }
  if (!met_own) { meet_own(); }

  for (const std::int64_t number : {self->lower, self->upper}) {
    if (number < 0) { continue; }
    std::int64_t block = -1;
    for (const Walk::Member& member : walk.members()) {
      if (!walk.needs(member, number)) { continue; }
      if (block < 0) { block = block_of(number); }
      routes.sends.push_back({block, step_of(member, number), member.rank});
      routes.ends.push_back(routes.sends.back());
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
