// SPDX-License-Identifier: Apache-2.0
#include "routes.hpp"

#include <algorithm>
#include <utility>

namespace annulus::planning {

namespace {

void sort_hops(std::vector<Hop>& hops) {
  std::stable_sort(hops.begin(), hops.end(), [](const Hop& a, const Hop& b) {
    return a.step != b.step ? a.step < b.step : (a.peer != b.peer ? a.peer < b.peer : a.block < b.block);
  });
}

Routes unsorted_routes(const Setting& setting, Schedule schedule) {
  switch (schedule) {
    case Schedule::ring:
      return ring_routes(setting);
    case Schedule::ring_full:
      return ring_full_routes(setting);
    case Schedule::direct:
    case Schedule::allgather:
    case Schedule::automatic:  // make_setting refuses it
      break;
  }
  return direct_routes(setting);
}

}  // namespace

std::vector<Member> members_of(const Setting& setting, std::int64_t branch, std::int64_t segment, const Rows<Global>& rows) {
  std::vector<Member> members;
  const Progression tokens = segment_range(setting.problem.seq_len, setting.branch(branch), segment);
  for (const std::int64_t rank : setting.partition.ranks_touching(tokens.first, tokens.last() + 1)) {
    Member member;
    member.rank = rank;
    for (const ShardPiece& piece : setting.partition.shard(rank).pieces) {
      Rows<Global> owned = intersect(rows, piece.global);
      if (owned.empty()) { continue; }
      member.last_row = std::max(member.last_row, owned.last());
      member.owned.push_back(std::move(owned));
    }
    if (!member.owned.empty()) { members.push_back(std::move(member)); }
  }
  return members;
}

std::int64_t add_block(Routes& routes, const Problem& problem, KvBlock block) {
  block.bytes = block_bytes(problem, block.rows_global.count(), block.kv_heads.count);
  routes.blocks.push_back(std::move(block));
  return std::ssize(routes.blocks) - 1;
}

Routes routes_of(const Setting& setting, Schedule schedule) {
  Routes routes = unsorted_routes(setting, schedule);
  sort_hops(routes.receives);
  sort_hops(routes.sends);
  sort_hops(routes.ends);
  // A block is met as it comes, unless the schedule says more.
  if (routes.uses.empty()) {
    for (const Hop& hop : routes.receives) { routes.uses.push_back({hop.step, hop.block}); }
  }
  add_extra_keys(routes, setting);
  sort_hops(routes.receives);
  sort_hops(routes.sends);
  std::stable_sort(routes.uses.begin(), routes.uses.end(), [](const Use& a, const Use& b) { return a.step < b.step; });
  return routes;
}

}  // namespace annulus::planning
