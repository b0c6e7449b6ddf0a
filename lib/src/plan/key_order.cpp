// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/key_order.hpp>

#include <annulus/core/error.hpp>

#include <fmt/ranges.h>

#include <algorithm>
#include <vector>

namespace annulus {

namespace {

/// Whether no shard would cut a block with another length or number of ranks. A branch that is as long as the sequence stays so.
bool holds(PartitionKind kind, Problem problem, Pattern pattern, std::int64_t seq_len, std::int64_t ranks, std::int64_t block_rows) {
  for (Branch& branch : pattern.branches) {
    if (branch.segment_length >= problem.seq_len) { branch.segment_length = seq_len; }
  }
  problem.seq_len = seq_len;
  return !find_cut_block(problem, pattern, Partition(kind, seq_len, ranks), block_rows);
}

/// "5 or 9" of the nearest numbers on both sides that pass, "5" of the only one, nothing if none of those tried does.
template <class Passes>
std::string nearest(std::int64_t from, std::int64_t unit, std::int64_t tries, Passes&& passes) {
  std::vector<std::string> found;
  const auto search = [&](std::int64_t first, std::int64_t step) {
    for (std::int64_t n = 0; n < tries && first + n * step >= 1; ++n) {
      if (passes(first + n * step)) {
        found.push_back(fmt::format("{}", first + n * step));
        return;
      }
    }
  };
  search((from - 1) / unit * unit, -unit);
  search(from / unit * unit + unit, unit);
  return fmt::format("{}", fmt::join(found, " or "));
}

}  // namespace

Routing choose_routing(PartitionKind partition, Schedule schedule, bool causal, KeyOrder asked, TileOrder tiles, std::int64_t block_rows,
                       const std::string& kernel) {
  if (tiles != TileOrder::linear) {
    ANNULUS_EXPECTS(asked != KeyOrder::cyclic, "--key-order cyclic and --tile-order {} are two orders of the same keys", to_string(tiles));
    return {schedule, KeyOrder::arrival, 0, tiles};
  }
  if (!keeps_key_order(partition, schedule, causal)) {
    ANNULUS_EXPECTS(
        asked != KeyOrder::cyclic || partition != PartitionKind::striped,
        "--key-order cyclic with --partition striped: every rank has rows of each block of keys; contiguous and zigzag keep one");
    ANNULUS_EXPECTS(asked != KeyOrder::cyclic,
                    "--key-order cyclic with --partition zigzag needs --causal and --schedule direct or allgather; found {} and {}",
                    causal ? "causal" : "no mask", to_string(schedule));
    return {schedule, KeyOrder::arrival, 0};
  }
  ANNULUS_EXPECTS(asked != KeyOrder::cyclic || block_rows > 0,
                  "--key-order cyclic: {} takes keys in the order in which they come; it can have auto or arrival", kernel);
  if (asked == KeyOrder::arrival || block_rows == 0) { return {schedule, KeyOrder::arrival, 0}; }
  return {schedule, KeyOrder::cyclic, block_rows};
}

std::optional<CutBlock> find_cut_block(const Problem& problem, const Pattern& pattern, const Partition& partition,
                                       std::int64_t block_rows) {
  std::vector<std::vector<HeadClass>> classes;
  for (std::int64_t branch = 0; branch < std::ssize(pattern.branches); ++branch) {
    classes.push_back(head_classes(problem, pattern, branch));
  }
  for (std::int64_t rank = 0; rank < partition.ranks(); ++rank) {
    for (const ShardPiece& piece : partition.shard(rank).pieces) {
      const std::int64_t end = piece.global.last() + 1;
      if (end >= problem.seq_len) { continue; }
      if (problem.extra_keys > 0 && end % block_rows != 0) { return CutBlock{rank, std::ssize(pattern.branches)}; }
      for (std::int64_t branch = 0; branch < std::ssize(pattern.branches); ++branch) {
        const std::int64_t segment = end / pattern.branches[static_cast<std::size_t>(branch)].segment_length;
        for (const HeadClass& heads : classes[static_cast<std::size_t>(branch)]) {
          const Rows<Global> all = segment_rows(problem.seq_len, pattern, branch, segment, heads);
          // A row that was turned over is a block by itself.
          const Progression rows = all.empty() ? Progression{} : all.run(all.runs() - 1);
          const std::int64_t before = rows.empty() ? 0 : std::clamp<std::int64_t>(ceil_div(end - rows.first, rows.stride), 0, rows.count);
          if (before < rows.count && before % block_rows != 0) { return CutBlock{rank, branch}; }
        }
      }
    }
  }
  return std::nullopt;
}

std::string describe_key_order(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing) {
  if (routing.tile_order != TileOrder::linear) {
    return fmt::format("tiles of queries and keys along a {} curve: other numbers of ranks give other bits, within rounding",
                       to_string(routing.tile_order));
  }
  if (routing.key_order != KeyOrder::cyclic) { return "keys as they come: other numbers of ranks give other bits, within rounding"; }
  const std::optional<CutBlock> cut = find_cut_block(problem, pattern, partition, routing.block_rows);
  if (!cut) {
    return fmt::format("keys in cyclic order: the same bits as on any ranks whose rows are whole blocks of {}", routing.block_rows);
  }
  const bool of_sequence = cut->branch == std::ssize(pattern.branches);
  std::string text =
      fmt::format("keys in cyclic order, but rank {} ends inside a block of {} rows of {}: not the bits of one rank", cut->rank,
                  routing.block_rows, of_sequence ? "the sequence, which meets the extra keys" : fmt::format("branch {}", cut->branch));
  const std::int64_t ranks = partition.ranks();
  const PartitionKind kind = partition.kind();
  std::int64_t rate = 1;
  for (const Branch& branch : pattern.branches) { rate = std::max(rate, branch.dilation_rate); }
  constexpr std::int64_t kTries = 64;
  const std::string lengths =
      nearest(problem.seq_len, std::ssize(partition.shard(0).pieces) * ranks * routing.block_rows * rate, kTries,
              [&](std::int64_t length) { return holds(kind, problem, pattern, length, ranks, routing.block_rows); });
  const std::string other_ranks = nearest(ranks, 1, kTries, [&](std::int64_t number) {
    return number > 1 && holds(kind, problem, pattern, problem.seq_len, number, routing.block_rows);
  });
  if (!lengths.empty()) { text += fmt::format("; it would be with --seq-len {}", lengths); }
  if (!other_ranks.empty()) { text += fmt::format("{} on {} ranks", lengths.empty() ? "; it would be" : ", or", other_ranks); }
  return text;
}

}  // namespace annulus
