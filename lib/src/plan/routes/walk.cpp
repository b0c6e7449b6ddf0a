// SPDX-License-Identifier: Apache-2.0
#include "walk.hpp"

#include <annulus/core/error.hpp>

#include "routes.hpp"

#include <algorithm>

namespace annulus::planning {

Walk::Walk(const Setting& setting, std::int64_t branch, std::int64_t segment, const Rows<Global>& rows)
    : causal_(setting.problem.causal), stripes_(!setting.partition.keeps_neighbours()) {
  for (const planning::Member& owner : members_of(setting, branch, segment, rows)) {
    ANNULUS_ASSERT(owner.owned.size() <= 2, "rank {} owns {} parts of a segment", owner.rank, owner.owned.size());
    for (const Rows<Global>& owned : owner.owned) { parts_.push_back({owner.rank, owned}); }
    members_.push_back({owner.rank, -1, -1, owner.last_row});
  }
  std::sort(parts_.begin(), parts_.end(), [](const Part& a, const Part& b) { return a.rows[0] < b.rows[0]; });
  for (std::int64_t number = 0; number < parts(); ++number) {
    const auto found = std::lower_bound(members_.begin(), members_.end(), part(number).rank,
                                        [](const Member& member, std::int64_t rank) { return member.rank < rank; });
    if (found->upper >= 0) { found->lower = found->upper; }
    found->upper = number;
  }
}

const Walk::Member* Walk::member(std::int64_t rank) const {
  const auto found = std::lower_bound(members_.begin(), members_.end(), rank,
                                      [](const Member& member, std::int64_t wanted) { return member.rank < wanted; });
  return found == members_.end() || found->rank != rank ? nullptr : &*found;
}

}  // namespace annulus::planning
