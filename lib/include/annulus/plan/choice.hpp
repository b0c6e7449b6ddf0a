// SPDX-License-Identifier: Apache-2.0
// What `auto` means for the grid, the partition and the schedule.
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/core/grid.hpp>
#include <annulus/core/problem.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace annulus {

/// A partition and a schedule, none of them automatic.
struct Ways {
  PartitionKind partition = PartitionKind::contiguous;
  Schedule schedule = Schedule::ring;
  std::string reason;  ///< one phrase on what was chosen; empty if both were asked for
};

/// Takes what was asked for and chooses the rest. Under a causal mask zigzag, if it takes more than a sixth off the busiest rank's work,
/// with direct, which keeps the order of keys, as long as no rank is asked for too much at once (see busiest_sender_share()); else ring,
/// whose blocks travel between neighbours alone.
/// @throws InvalidArgument as make_plan
Ways choose_ways(const Problem& problem, const Pattern& pattern, PartitionKind partition, Schedule schedule, std::int64_t ranks);

/// The grids of so many ranks whose parts divide what they cut, so that rings have equally many batch entries and heads: those of most
/// rings first, parts of the batch before parts of the heads.
std::vector<Grid> even_grids(const Problem& problem, std::int64_t ranks);

/// A grid with as many places as there are ranks.
struct GridChoice {
  Grid grid;
  std::string reason;  ///< one phrase on why; empty if it was asked for
};

/// Takes the grid that was asked for, or chooses one. Batch entries and heads need nothing of each other, so it takes as many rings as
/// there can be, of as few ranks, among the grids whose busiest rank has hardly more work than that of any other grid; parts of the batch
/// before parts of the heads.
/// @throws InvalidArgument as resolve_grid() and make_plan()
GridChoice choose_grid(const Grid& asked, const Problem& problem, const Pattern& pattern, PartitionKind partition, Schedule schedule,
                       std::int64_t ranks);

}  // namespace annulus
