// SPDX-License-Identifier: Apache-2.0
#include "setting.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>

namespace annulus::planning {

Setting make_setting(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing,
                     std::int64_t rank) {
  validate(problem);
  validate(pattern);
  validate(problem, pattern);
  ANNULUS_EXPECTS(partition.seq_len() == problem.seq_len, "the partition is of {} tokens, the problem of {}", partition.seq_len(),
                  problem.seq_len);
  ANNULUS_EXPECTS(routing.schedule != Schedule::automatic, "a plan of schedule auto");
  const bool cyclic = routing.key_order == KeyOrder::cyclic;
  ANNULUS_EXPECTS(routing.key_order != KeyOrder::automatic && (routing.block_rows > 0) == cyclic, "key order {} with blocks of {} rows",
                  to_string(routing.key_order), routing.block_rows);
  ANNULUS_EXPECTS(!cyclic || keeps_key_order(partition.kind(), routing.schedule, problem.causal),
                  "--partition {} keeps no order of keys {} with --schedule {}", to_string(partition.kind()),
                  problem.causal ? "under --causal" : "without a mask", to_string(routing.schedule));
  ANNULUS_EXPECTS(!cyclic || routing.tile_order == TileOrder::linear, "key order cyclic with tiles in the order {}",
                  to_string(routing.tile_order));
  Setting setting{problem, pattern, partition, routing, rank, partition.shard(rank), {}};
  for (std::int64_t branch = 0; branch < std::ssize(pattern.branches); ++branch) {
    setting.classes.emplace_back(head_classes(problem, pattern, branch));
  }
  return setting;
}

Progression whole_segments(const Setting& setting, std::int64_t branch, const ShardPiece& piece) {
  if (piece.global.stride != 1) { return {}; }
  const std::int64_t w = setting.branch(branch).segment_length;
  return range(ceil_div(piece.global.first, w), floor_div(piece.global.last() + 1, w));
}

std::vector<std::int64_t> cut_segments(const Setting& setting, std::int64_t branch) {
  std::vector<std::int64_t> cut;
  const std::int64_t w = setting.branch(branch).segment_length;
  for (const ShardPiece& piece : setting.shard.pieces) {
    const Progression whole = whole_segments(setting, branch, piece);
    const std::int64_t first = piece.global.first / w;
    const std::int64_t last = piece.global.last() / w;
    if (whole.empty()) {
      for (std::int64_t segment = first; segment <= last; ++segment) { cut.push_back(segment); }
    } else {
      if (first < whole.first) { cut.push_back(first); }
      if (last > whole.last()) { cut.push_back(last); }
    }
  }
  std::sort(cut.begin(), cut.end());
  cut.erase(std::unique(cut.begin(), cut.end()), cut.end());
  return cut;
}

}  // namespace annulus::planning
