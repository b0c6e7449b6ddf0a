// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <list>
#include <memory>

namespace annulus {

/// Plans by the arguments that they were made from, so that a loop over the same problem plans once. What was asked for longest ago goes
/// first. Used by one thread at a time.
class PlanCache {
 public:
  /// @param capacity  plans to keep; 0: none
  /// @throws InvalidArgument if it is negative
  explicit PlanCache(std::int64_t capacity);

  /// As make_plan(), which it calls where it does not have the plan.
  std::shared_ptr<const RingPlan> plan(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing,
                                       std::int64_t rank);

  std::int64_t capacity() const { return capacity_; }
  /// Plans made so far, and plans found.
  std::int64_t made() const { return made_; }
  std::int64_t found() const { return found_; }

 private:
  struct Entry {
    Partition partition;
    std::shared_ptr<const RingPlan> plan;  ///< holds the other arguments
  };

  std::int64_t capacity_;
  std::list<Entry> entries_;  ///< the one that was asked for last comes first
  std::int64_t made_ = 0;
  std::int64_t found_ = 0;
};

}  // namespace annulus
