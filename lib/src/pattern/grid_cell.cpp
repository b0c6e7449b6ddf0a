// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/grid_cell.hpp>

#include <annulus/core/error.hpp>
#include <annulus/pattern/partition.hpp>

namespace annulus {

Grid resolve_grid(const Grid& asked, const Problem& whole, std::int64_t ranks) {
  ANNULUS_EXPECTS(asked.batch <= whole.batch, "--grid {}: the batch has {} entr{}", to_string(asked), whole.batch,
                  whole.batch == 1 ? "y" : "ies");
  ANNULUS_EXPECTS(asked.heads <= whole.heads, "--grid {}: the problem has {} head{}", to_string(asked), whole.heads,
                  whole.heads == 1 ? "" : "s");
  Grid grid = asked;
  if (grid.seq == 0) {
    ANNULUS_EXPECTS(ranks % grid.rings() == 0, "--grid {}: {} ranks are not divisible into {} rings", to_string(asked), ranks,
                    grid.rings());
    grid.seq = ranks / grid.rings();
  }
  ANNULUS_EXPECTS(grid.rings() * grid.seq == ranks, "--grid {} has {} places, and there are {} ranks", to_string(asked),
                  grid.rings() * grid.seq, ranks);
  return grid;
}

namespace {

struct Heads {
  Progression query;
  Progression kv;
};

Heads heads_of_part(const Problem& whole, std::int64_t parts, std::int64_t part) {
  if (parts <= whole.kv_heads) {
    const Progression kv = split_by_rank(whole.kv_heads, parts, part);
    return {{kv.first * whole.group_size(), 1, kv.count * whole.group_size()}, kv};
  }
  for (std::int64_t kv = 0;; ++kv) {
    const Progression sharing = split_by_rank(parts, whole.kv_heads, kv);
    if (!sharing.contains(part)) { continue; }
    Progression query = split_by_rank(whole.group_size(), sharing.count, part - sharing.first);
    query.first += kv * whole.group_size();
    return {query, {kv, 1, 1}};
  }
}

}  // namespace

GridCell cell_of(const Problem& whole, const Grid& grid, std::int64_t ring) {
  ANNULUS_EXPECTS(ring >= 0 && ring < grid.rings(), "ring {} of {}", ring, grid.rings());
  GridCell cell;
  cell.problem = whole;
  const Progression entries = split_by_rank(whole.batch, grid.batch, ring / grid.heads);
  cell.first_batch = entries.first;
  cell.problem.batch = entries.count;
  if (!whole.kv_lengths.empty()) {
    const auto first = whole.kv_lengths.begin() + entries.first;
    cell.problem.kv_lengths.assign(first, first + entries.count);
  }
  // A problem that nothing was cut off stays equal to the whole.
  if (grid.heads == 1) { return cell; }
  const Heads heads = heads_of_part(whole, grid.heads, ring % grid.heads);
  cell.first_head = heads.query.first;
  cell.first_kv_head = heads.kv.first;
  cell.problem.heads = heads.query.count;
  cell.problem.kv_heads = heads.kv.count;
  cell.problem.window = {heads.query.first, whole.heads, whole.kv_heads};
  return cell;
}

}  // namespace annulus
