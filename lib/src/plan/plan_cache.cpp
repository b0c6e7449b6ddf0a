// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/plan_cache.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <utility>

namespace annulus {

PlanCache::PlanCache(std::int64_t capacity) : capacity_(capacity) {
  ANNULUS_EXPECTS(capacity >= 0, "a cache of {} plans is not possible", capacity);
}

std::shared_ptr<const RingPlan> PlanCache::plan(const Problem& problem, const Pattern& pattern, const Partition& partition,
                                                const Routing& routing, std::int64_t rank) {
  const auto entry = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& known) {
    return known.plan->rank == rank && known.partition == partition && known.plan->routing == routing && known.plan->problem == problem &&
           known.plan->pattern == pattern;
  });
  if (entry != entries_.end()) {
    ++found_;
    entries_.splice(entries_.begin(), entries_, entry);
    return entry->plan;
  }
  auto made = std::make_shared<const RingPlan>(make_plan(problem, pattern, partition, routing, rank));
  ++made_;
  if (capacity_ > 0) {
    entries_.push_front({partition, made});
    if (std::ssize(entries_) > capacity_) { entries_.pop_back(); }
  }
  return made;
}

}  // namespace annulus
