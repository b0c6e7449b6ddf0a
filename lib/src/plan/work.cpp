// SPDX-License-Identifier: Apache-2.0
#include "work.hpp"

#include <annulus/core/error.hpp>
#include <annulus/pattern/permutation.hpp>

#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <utility>

namespace annulus::planning {

namespace {

/// Where the rows of an item stand in their segment.
kernels::SegmentPlace place_of(const Setting& setting, const WorkItem& item) {
  const Rows<Global> rows = setting.rows_of(item.branch, item.head_class, item.segment);
  const Progression q = segment_places(rows, item.q_global.only(), setting.routing.block_rows);
  const Progression k = segment_places(rows, item.k_global.only(), setting.routing.block_rows);
  ANNULUS_EXPECTS(q.stride == 1 && k.stride == 1, "rank {} does not own neighbouring rows, which key order cyclic needs", setting.rank);
  return {setting.routing.block_rows, q.first, k.first, item.place.part};
}

/// Whether some query of an item with a place has keys of it from its own block down, and whether some has keys above its own block.
bool any_down(const WorkItem& item) {
  const kernels::SegmentPlace& place = item.place;
  return place.k_first / place.block_rows <= (place.q_first + item.q_global.count() - 1) / place.block_rows;
}
bool any_above(const WorkItem& item) {
  const kernels::SegmentPlace& place = item.place;
  return (place.k_first + item.k_global.count() - 1) / place.block_rows > place.q_first / place.block_rows;
}

/// Whether rows have an order of keys in which they come to those above their own block: a causal mask hides what lies there.
bool looks_up(const Setting& setting) { return setting.routing.key_order == KeyOrder::cyclic && !setting.problem.causal; }

/// The attention of a run of queries to a run of keys, which lie in `block` if there is one; nothing if the mask hides all of it.
std::optional<WorkItem> make_item(const Setting& setting, WorkItem item, const Progression& q_rows, const Progression& k_rows,
                                  const KvBlock* block) {
  const bool causal = setting.problem.causal;
  if (causal && k_rows.first > q_rows.last()) { return std::nullopt; }
  item.mask = causal && k_rows.last() > q_rows.first ? kernels::Mask::causal : kernels::Mask::none;
  item.q_global = Rows<Global>(q_rows);
  item.q_local = local_rows(setting.shard, item.q_global);
  item.k_global = Rows<Global>(k_rows);
  if (setting.routing.key_order == KeyOrder::cyclic) { item.place = place_of(setting, item); }
  if (block != nullptr) {
    item.k_packed = packed_rows(block->rows_global, item.k_global);
  } else {
    item.k_local = local_rows(setting.shard, item.k_global);
    item.keys.offset_bytes = resident_offset(setting.problem, piece_at(setting.shard, item.k_local.only().first));
  }
  if (q_rows == k_rows) {
    item.zero_keys = zero_keys(setting.problem, setting.pattern, item.branch, setting.rows_of(item.branch, item.head_class, item.segment));
  }
  return item;
}

/// The attention of a run of queries to `k_rows`, as many items as it takes, in the order in which the rows meet their keys: the later runs
/// come first, except for what lies above a row's own block, which comes last.
std::vector<WorkItem> make_items(const Setting& setting, const WorkItem& item, const Progression& q_rows, const Rows<Global>& k_rows,
                                 const KvBlock* block) {
  std::vector<WorkItem> items;
  std::vector<WorkItem> above;
  for (std::int64_t run = k_rows.runs() - 1; run >= 0; --run) {
    std::optional<WorkItem> made = make_item(setting, item, q_rows, k_rows.run(run), block);
    if (!made) { continue; }
    const bool cut = k_rows.runs() > 1 && looks_up(setting) && any_above(*made);
    if (!cut) {
      items.push_back(std::move(*made));
      continue;
    }
    if (any_down(*made)) {
      items.push_back(*made);
      items.back().place.part = kernels::KeyPart::down;
      made->place.part = kernels::KeyPart::above;
      made->zero_keys = 0;
    }
    above.push_back(std::move(*made));
  }
  items.insert(items.end(), above.begin(), above.end());
  return items;
}

constexpr std::int64_t kMostTiles = 8;  // along queries, and along keys: what a plan holds does not grow with the sequence

/// A run as tiles, of whole tiles of every kernel where it is long. They depend on the run alone, so that a row is in the same one whatever
/// keys it meets.
std::vector<Progression> tiles_of(const Progression& run) {
  constexpr std::int64_t kLong = 1024;
  const std::int64_t unit = run.count < kLong ? 16 : kLong / kMostTiles;
  const std::int64_t rows = ceil_div(ceil_div(run.count, kMostTiles), unit) * unit;
  std::vector<Progression> tiles;
  for (std::int64_t first = 0; first < run.count; first += rows) {
    tiles.push_back({run[first], run.stride, std::min(rows, run.count - first)});
  }
  return tiles;
}

/// The attention of a run of queries to `k_rows` along a Hilbert curve over tiles of queries (down) and of keys (across).
std::vector<WorkItem> make_items_along_curve(const Setting& setting, const WorkItem& item, const Progression& q_rows,
                                             const Rows<Global>& k_rows, const KvBlock* block) {
  std::vector<WorkItem> items;
  const std::vector<Progression> q_tiles = tiles_of(q_rows);
  for (std::int64_t run = 0; run < k_rows.runs(); ++run) {
    const std::vector<Progression> k_tiles = tiles_of(k_rows.run(run));
    std::size_t side = 1;
    while (side < std::max(q_tiles.size(), k_tiles.size())) { side *= 2; }
    const Permutation curve(SequenceOrder::hilbert, static_cast<std::int64_t>(side * side));
    for (std::int64_t place = 0; place < curve.seq_len(); ++place) {
      const auto cell = static_cast<std::size_t>(curve.row_at(place));
      if (cell / side >= q_tiles.size() || cell % side >= k_tiles.size()) { continue; }
      if (auto made = make_item(setting, item, q_tiles[cell / side], k_tiles[cell % side], block)) { items.push_back(std::move(*made)); }
    }
  }
  return items;
}

/// Appends the attention of `q_rows` (of one piece of the shard) to `k_rows` (of one piece, or of `block` if there is one).
void append_items(std::vector<WorkItem>& work, const Setting& setting, const WorkItem& item, const Rows<Global>& q_rows,
                  const Rows<Global>& k_rows, const KvBlock* block) {
  for (std::int64_t run = 0; run < q_rows.runs(); ++run) {
    const bool along_curve = setting.routing.tile_order == TileOrder::hilbert;
    for (WorkItem& made : (along_curve ? make_items_along_curve : make_items)(setting, item, q_rows.run(run), k_rows, block)) {
      for (const HeadSet& set : setting.heads(item.branch, item.head_class).head_sets) {
        made.heads = set;
        work.push_back(made);
      }
    }
  }
}

/// Whole segments of a piece, as one item for all that look alike.
void attend_whole_segments(std::vector<WorkItem>& work, const Setting& setting, WorkItem item, const ShardPiece& piece) {
  const Progression segments = whole_segments(setting, item.branch, piece);
  const std::int64_t period = offset_period(setting.pattern, item.branch);
  for (std::int64_t lead = 0; lead < std::min(period, segments.count); ++lead) {
    item.segment = segments.first + lead;
    item.segments = (segments.count - 1 - lead) / period + 1;
    item.segment_stride = period * setting.branch(item.branch).segment_length;
    const Rows<Global> rows = setting.rows_of(item.branch, item.head_class, item.segment);
    append_items(work, setting, item, rows, rows, nullptr);
  }
}

void attend_cut_segment(std::vector<WorkItem>& work, const Setting& setting, WorkItem item, std::int64_t segment) {
  const Rows<Global> rows = setting.rows_of(item.branch, item.head_class, segment);
  item.segment = segment;
  const bool keeps_order = setting.routing.key_order == KeyOrder::cyclic;
  for (const ShardPiece& q_piece : setting.shard.pieces) {
    for (const ShardPiece& k_piece : setting.shard.pieces) {
      // Keys of another piece have their turn in the walk.
      if (keeps_order && q_piece != k_piece) { continue; }
      append_items(work, setting, item, intersect(rows, q_piece.global), intersect(rows, k_piece.global), nullptr);
    }
  }
}

/// Keys of the rank's own rows.
void attend_resident(std::vector<WorkItem>& work, const Setting& setting) {
  setting.for_each_class([&](std::int64_t branch, std::int64_t head_class) {
    WorkItem item;
    item.branch = branch;
    item.head_class = head_class;
    for (const ShardPiece& piece : setting.shard.pieces) { attend_whole_segments(work, setting, item, piece); }
    for (const std::int64_t segment : cut_segments(setting, branch)) { attend_cut_segment(work, setting, item, segment); }
  });
}

/// Queries of the shard, or of one piece of it, in one segment to `k_rows`, which lie in `block`.
void attend_block(std::vector<WorkItem>& work, const Setting& setting, const WorkItem& item, const KvBlock& block,
                  const Rows<Global>& k_rows, std::int64_t q_piece) {
  if (k_rows.empty()) { return; }
  const Rows<Global> rows = setting.rows_of(item.branch, item.head_class, item.segment);
  for (std::int64_t piece = 0; piece < std::ssize(setting.shard.pieces); ++piece) {
    if (q_piece >= 0 && piece != q_piece) { continue; }
    append_items(work, setting, item, intersect(rows, setting.shard.pieces[static_cast<std::size_t>(piece)].global), k_rows, &block);
  }
}

/// All queries of the shard to the extra keys, which lie in `block`.
void attend_extra_keys(std::vector<WorkItem>& work, const Setting& setting, WorkItem item, const KvBlock& block) {
  const Problem& problem = setting.problem;
  item.branch = std::ssize(setting.pattern.branches);
  item.heads = {range(0, problem.kv_heads), 0, problem.group_size()};
  item.k_global = block.rows_global;
  item.k_packed = packed_rows(block.rows_global, item.k_global);
  for (const ShardPiece& piece : setting.shard.pieces) {
    item.q_global = Rows<Global>(piece.global);
    item.q_local = local_rows(setting.shard, item.q_global);
    work.push_back(item);
  }
}

void attend_used(std::vector<Step>& steps, const Setting& setting, const Routes& routes, const std::vector<Use>& uses,
                 const std::vector<BlockPlace>& places) {
  for (const Use& use : uses) {
    std::vector<WorkItem>& work = steps[static_cast<std::size_t>(use.step)].work;
    WorkItem item;
    if (use.block < 0) {
      item.branch = use.branch;
      item.head_class = use.head_class;
      item.segment = use.segment;
      const Rows<Global> rows = setting.rows_of(item.branch, item.head_class, item.segment);
      const std::vector<ShardPiece>& pieces = setting.shard.pieces;
      append_items(work, setting, item, intersect(rows, pieces[1].global), intersect(rows, pieces[0].global), nullptr);
      continue;
    }
    const KvBlock& block = routes.blocks[static_cast<std::size_t>(use.block)];
    const BlockPlace& place = places[static_cast<std::size_t>(use.block)];
    item.keys = {use.block, place.buffer, place.offset_bytes};
    if (setting.problem.is_extra(block.rows_global[0])) {
      attend_extra_keys(work, setting, std::move(item), block);
      continue;
    }
    if (block.branch >= 0) {
      item.branch = block.branch;
      item.head_class = block.head_class;
      item.segment = block.segment;
      attend_block(work, setting, item, block, block.rows_global, use.q_piece);
      continue;
    }
    setting.for_each_class([&](std::int64_t branch, std::int64_t head_class) {
      item.branch = branch;
      item.head_class = head_class;
      for (const std::int64_t segment : cut_segments(setting, branch)) {
        item.segment = segment;
        attend_block(work, setting, item, block, intersect(setting.rows_of(branch, head_class, segment), block.rows_global.only()),
                     use.q_piece);
      }
    });
  }
}

/// Cuts what the resident keys of a segment have above the blocks of its queries off step 0, and attends it after the segment's last block.
void put_off_keys_above(std::vector<Step>& steps) {
  using Segment = std::tuple<std::int64_t, std::int64_t, std::int64_t>;
  std::map<Segment, std::size_t> last_step;
  for (std::size_t step = 1; step < steps.size(); ++step) {
    for (const WorkItem& item : steps[step].work) { last_step[{item.branch, item.head_class, item.segment}] = step; }
  }
  std::vector<WorkItem> at_once;
  for (WorkItem& item : steps.front().work) {
    const auto last = last_step.find({item.branch, item.head_class, item.segment});
    if (last == last_step.end() || item.segments > 1 || !any_above(item) || item.place.part == kernels::KeyPart::down) {
      at_once.push_back(std::move(item));
      continue;
    }
    WorkItem above = item;
    if (item.place.part == kernels::KeyPart::all && any_down(item)) {
      item.place.part = kernels::KeyPart::down;
      at_once.push_back(std::move(item));
      above.zero_keys = 0;
    }
    above.place.part = kernels::KeyPart::above;
    steps[last->second].work.push_back(std::move(above));
  }
  steps.front().work = std::move(at_once);
}

/// Numbers the waves of one step: an item comes one wave after the last before it that folds into rows of the same partial, which those
/// of the same branch, heads, segment and first query row do, and where branches share a partial all of another branch. Along a curve it
/// comes no wave before the last item of its heads and segment. Then orders the items by wave.
/// @param shares  whether the item of a branch folds into a partial of others
template <class Shares>
void number_waves(std::vector<WorkItem>& work, const Shares& shares, TileOrder tiles) {
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  std::map<Key, std::int64_t> next_of_rows;
  std::map<Key, std::int64_t> last_on_curve;
  std::map<std::int64_t, std::int64_t> next_of_branch;
  for (WorkItem& item : work) {
    const Key key{item.branch, item.head_class, item.segment, item.heads.q_first, item.q_local.only().first};
    const Key curve{item.branch, item.head_class, item.segment, item.heads.q_first, 0};
    const auto found = next_of_rows.find(key);
    item.wave = found == next_of_rows.end() ? 0 : found->second;
    if (shares(item.branch)) {
      for (const auto& [branch, next] : next_of_branch) {
        if (branch != item.branch) { item.wave = std::max(item.wave, next); }
      }
    }
    if (tiles == TileOrder::hilbert) { item.wave = std::max(item.wave, last_on_curve[curve]); }
    last_on_curve[curve] = item.wave;
    next_of_rows[key] = item.wave + 1;
    std::int64_t& next = next_of_branch[item.branch];
    next = std::max(next, item.wave + 1);
  }
  std::stable_sort(work.begin(), work.end(), [](const WorkItem& a, const WorkItem& b) { return a.wave < b.wave; });
}

/// Those of the branches.
std::int64_t branch_partials(const Setting& setting) {
  const bool for_each_branch = setting.routing.key_order == KeyOrder::cyclic && !one_branch_per_head(setting.pattern);
  return for_each_branch ? std::ssize(setting.pattern.branches) : partial_count(setting.pattern);
}

}  // namespace

std::int64_t extra_partial_of(const Setting& setting) {
  const std::int64_t of_branches = branch_partials(setting);
  // Keys come last in a row's order, and these are met before others have come.
  const bool shares = of_branches == 1 && setting.routing.key_order == KeyOrder::arrival;
  return setting.problem.extra_keys == 0 || shares ? -1 : of_branches;
}

std::int64_t partials_of(const Setting& setting) { return branch_partials(setting) + (extra_partial_of(setting) < 0 ? 0 : 1); }

void add_items(const Setting& setting, const Routes& routes, std::int64_t first, const std::vector<Use>& uses, Layout& layout) {
  attend_resident(layout.steps[first].work, setting);
  attend_used(layout.steps, setting, routes, uses, layout.places);
}

void add_work(const Setting& setting, const Routes& routes, Layout& layout) {
  add_items(setting, routes, 0, routes.uses, layout);
  if (looks_up(setting)) { put_off_keys_above(layout.steps); }
  const bool one_for_all = branch_partials(setting) == 1;
  const std::int64_t extra = extra_partial_of(setting);
  const auto is_extra = [&](std::int64_t branch) { return branch == std::ssize(setting.pattern.branches); };
  const bool branches_meet = one_for_all && !one_branch_per_head(setting.pattern);
  for (Step& step : layout.steps) {
    for (WorkItem& item : step.work) { item.partial = is_extra(item.branch) && extra >= 0 ? extra : one_for_all ? 0 : item.branch; }
    number_waves(step.work, [&](std::int64_t branch) { return is_extra(branch) ? extra < 0 : branches_meet; }, setting.routing.tile_order);
  }
}

}  // namespace annulus::planning
