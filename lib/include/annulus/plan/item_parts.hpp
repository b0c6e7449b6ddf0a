// SPDX-License-Identifier: Apache-2.0
// What Problem::kv_lengths leaves of the work items of a plan, which are the same for all batch entries.
#pragma once

#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// Keys of segment `segment` of an item, 0 <= segment < item.segments, that queries of a batch entry may see: the first ones.
std::int64_t keys_left(const Problem& problem, const WorkItem& item, std::int64_t entry, std::int64_t segment);

/// Batch entries and segments of an item that have the same keys left.
struct ItemPart {
  std::int64_t first_entry = 0;
  std::int64_t entries = 0;
  std::int64_t first_segment = 0;  ///< counted in the item
  std::int64_t segments = 0;
  std::int64_t keys = 0;  ///< of each segment, the first ones; at least 1
  bool operator==(const ItemPart&) const = default;
};

/// The parts of an item in which keys are left, disjoint: one for all of it without kv_lengths.
std::vector<ItemPart> parts_of(const Problem& problem, const WorkItem& item);

}  // namespace annulus
