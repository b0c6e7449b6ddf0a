// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/grid.hpp>
#include <annulus/core/problem.hpp>

#include <cstdint>

namespace annulus {

/// What the ranks of one ring attend: some batch entries and some query heads, with the KV heads that these see, all tokens.
struct GridCell {
  std::int64_t first_batch = 0;
  std::int64_t first_head = 0;
  std::int64_t first_kv_head = 0;
  Problem problem;  ///< with the cell's own batch, heads and kv_heads; the heads are a window of the whole's
  bool operator==(const GridCell&) const = default;
};

/// A grid that is asked for, with its `seq` filled in.
/// @throws InvalidArgument unless the grid has as many places as there are ranks, and each ring has a batch entry and a head
Grid resolve_grid(const Grid& asked, const Problem& whole, std::int64_t ranks);

/// What ring `ring` of the grid attends: rank r of the job is in ring r / seq. KV heads are dealt out like rows of a sequence; where there
/// are more parts than KV heads, a KV head is given to several neighbouring parts, and its query heads are dealt out among them.
GridCell cell_of(const Problem& whole, const Grid& grid, std::int64_t ring);

}  // namespace annulus
