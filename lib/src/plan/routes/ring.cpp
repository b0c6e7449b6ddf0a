// SPDX-License-Identifier: Apache-2.0
#include "routes.hpp"

#include <algorithm>
#include <optional>

namespace annulus::planning {

namespace {

/// Passes the blocks of one segment and head class.
void pass_segment(Routes& routes, const Setting& setting, std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
  const std::vector<Member> members = members_of(setting, branch, segment, setting.rows_of(branch, head_class, segment));
  const auto self = std::find_if(members.begin(), members.end(), [&](const Member& member) { return member.rank == setting.rank; });
  if (self == members.end()) { return; }
  const std::int64_t size = std::ssize(members);
  const std::int64_t self_index = self - members.begin();
  const auto member = [&](std::int64_t index) -> const Member& { return members[static_cast<std::size_t>(index)]; };
  for (std::int64_t owner = 0; owner < size; ++owner) {
    for (const Rows<Global>& owned : member(owner).owned) {
      const auto needs = [&](std::int64_t index) {
        return index != owner && (!setting.problem.causal || member(index).last_row >= owned[0]);
      };
      if (self_index != owner && !needs(self_index)) { continue; }
      // Walk the cyclic order from the owner: who hands the block to this rank, in which step, and who gets it next.
      std::int64_t arrival = 0;
      std::int64_t previous = member(owner).rank;
      std::optional<std::int64_t> next;
      bool passed_self = self_index == owner;
      Hop last;  // of the block's way
      for (std::int64_t distance = 1; distance < size && (!next || self_index == owner); ++distance) {
        const std::int64_t index = (owner + distance) % size;
        if (!needs(index)) { continue; }
        last = {0, last.step + 1, member(index).rank};
        if (passed_self) {
          if (!next) { next = member(index).rank; }
        } else {
          ++arrival;
          passed_self = index == self_index;
          if (!passed_self) { previous = member(index).rank; }
        }
      }
      if (self_index == owner && !next) { continue; }
      const Progression& kv_heads = setting.heads(branch, head_class).kv;
      const std::int64_t block = add_block(routes, setting.problem, {branch, head_class, segment, member(owner).rank, owned, kv_heads, 0});
      if (self_index != owner) { routes.receives.push_back({block, arrival, previous}); }
      if (next) { routes.sends.push_back({block, arrival + 1, *next}); }
      if (self_index == owner) { routes.ends.push_back({block, last.step, last.peer}); }
    }
  }
}

}  // namespace

Routes ring_routes(const Setting& setting) {
  Routes routes;
  for_each_cut_segment(setting, [&](std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
    pass_segment(routes, setting, branch, head_class, segment);
  });
  return routes;
}

}  // namespace annulus::planning
