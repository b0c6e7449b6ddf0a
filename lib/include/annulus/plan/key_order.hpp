// SPDX-License-Identifier: Apache-2.0
// Which order of keys a run has, and whether its bits are those of any other number of ranks.
#pragma once

#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <optional>
#include <string>

namespace annulus {

/// The routing for a partition, a schedule and an order of keys that were asked for.
/// @param causal      whether the problem is
/// @param block_rows  the kernel's block, 0 if it keeps no order of keys
/// @param kernel      its name, for the refusal
/// @throws InvalidArgument if KeyOrder::cyclic is asked of a kernel, a partition and schedule, or an order of tiles, that keep no order of
/// keys
Routing choose_routing(PartitionKind partition, Schedule schedule, bool causal, KeyOrder asked, TileOrder tiles, std::int64_t block_rows,
                       const std::string& kernel);

/// A shard that ends inside a block of a branch.
struct CutBlock {
  std::int64_t rank = 0;
  std::int64_t branch = 0;  ///< one past the last: a block of the whole sequence, whose rows meet the extra keys together
};

/// The first shard that ends inside a block of a segment of some branch, or where there are extra keys of the sequence, if any does.
std::optional<CutBlock> find_cut_block(const Problem& problem, const Pattern& pattern, const Partition& partition, std::int64_t block_rows);

/// One sentence: the order of keys, and whether results are the same bits on any number of ranks whose shards are whole blocks. Where a
/// shard cuts a block, lengths and numbers of ranks near by for which none does.
std::string describe_key_order(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing);

}  // namespace annulus
