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
      // How far along the cyclic order a block is tells the step, so that in a step each rank gets the blocks of one other.
      const auto needs = [&](std::int64_t distance) {
        if (distance < 1 || distance >= size) { return false; }
        return !setting.problem.causal || member((owner + distance) % size).last_row >= owned[0];
      };
      const auto rank_at = [&](std::int64_t distance) { return member((owner + distance) % size).rank; };
      const std::int64_t self_distance = (self_index - owner + size) % size;
      if (self_distance > 0 && !needs(self_distance)) { continue; }
      const KvBlock block{branch, head_class, segment, member(owner).rank, owned, setting.heads(branch, head_class).kv, 0};
      if (self_distance > 0) {
        const std::int64_t number = add_block(routes, setting.problem, block);
        // Behind ranks that do not need it the owner begins again.
        routes.receives.push_back({number, self_distance, needs(self_distance - 1) ? rank_at(self_distance - 1) : rank_at(0)});
        if (needs(self_distance + 1)) { routes.sends.push_back({number, self_distance + 1, rank_at(self_distance + 1)}); }
        continue;
      }
      std::optional<std::int64_t> number;
      for (std::int64_t distance = 1; distance < size; ++distance) {
        if (!needs(distance)) { continue; }
        if (!number) { number = add_block(routes, setting.problem, block); }
        if (!needs(distance - 1)) { routes.sends.push_back({*number, distance, rank_at(distance)}); }
        if (!needs(distance + 1)) { routes.ends.push_back({*number, distance, rank_at(distance)}); }
      }
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
