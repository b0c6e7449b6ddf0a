// SPDX-License-Identifier: Apache-2.0
// What `auto` means for the partition and the schedule.
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/core/problem.hpp>

#include <cstdint>
#include <string>

namespace annulus {

/// A partition and a schedule, none of them automatic.
struct Ways {
  PartitionKind partition = PartitionKind::contiguous;
  Schedule schedule = Schedule::ring;
  std::string reason;  ///< one phrase on what was chosen; empty if both were asked for
};

/// Takes what was asked for and chooses the rest. Under a causal mask zigzag, if it takes more than a sixth off the busiest rank's work,
/// with direct, which keeps the order of keys; else contiguous, with ring, whose blocks travel between neighbours alone.
/// @throws InvalidArgument as make_plan
Ways choose_ways(const Problem& problem, const Pattern& pattern, PartitionKind partition, Schedule schedule, std::int64_t ranks);

}  // namespace annulus
