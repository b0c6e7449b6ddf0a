// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/coverage.hpp>

#include <annulus/core/error.hpp>
#include <annulus/plan/item_parts.hpp>

#include "gradient_flow.hpp"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

namespace annulus {

namespace {

using planning::BlockKey;
using planning::global_row;
using planning::key_of;
using planning::step_or_empty;

/// What lies somewhere: K and V of a block, or its dK and dV.
struct Content {
  BlockKey block;
  bool gradient = false;
  std::int64_t bytes = 0;
};

/// A byte range of one buffer, and the step whose message holds it.
struct Range {
  BufferId buffer = BufferId::resident;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t step = 0;
  bool overlaps(const Range& other) const { return buffer == other.buffer && begin < other.end && other.begin < end; }
};

/// The state of one rank's memory while its plan runs.
class RankMemory {
 public:
  explicit RankMemory(const RingPlan& plan) : plan_(plan) {
    const Problem& problem = plan.problem;
    const std::int64_t bytes = 2 * problem.batch * problem.extra_keys * problem.kv_heads * problem.head_dim * size_of(problem.dtype);
    ANNULUS_ASSERT(buffer_bytes(plan, BufferId::extra) == (plan.rank == 0 ? bytes : 0), "rank {} keeps {} bytes of extra keys", plan.rank,
                   buffer_bytes(plan, BufferId::extra));
    if (bytes == 0 || plan.rank != 0) { return; }
    const Rows<Global> keys(range(problem.seq_len, problem.seq_len + problem.extra_keys));
    content_[{BufferId::extra, 0}] = {-1, -1, -1, 0, keys, range(0, problem.kv_heads), bytes};
  }

  const KvBlock& block(std::int64_t index) const { return plan_.blocks.at(index); }

  void pack(std::int64_t number, const Step& step) {
    std::vector<Range> written;
    for (const PackItem& pack : step.packs) {
      const KvBlock& what = block(pack.block);
      if (pack.from == BufferId::resident) {
        check_own_rows(pack.block, pack.from_rows);
      } else {
        expect_content(pack.block, pack.from, pack.from_offset_bytes, number);
        refuse_overlap(range_of(pack.from, pack.from_offset_bytes, what.bytes), landing_, number);
      }
      const Range target = range_of(pack.to, pack.to_offset_bytes, what.bytes);
      refuse_overlap(target, leaving_, number);
      refuse_overlap(target, landing_, number);
      refuse_overlap(target, written, number);
      written.push_back(target);
      evict(target);
      content_[{pack.to, pack.to_offset_bytes}] = {key_of(what), false, what.bytes};
    }
  }

  void post(std::int64_t number, const Step& step) {
    for (const Message& message : step.sends) {
      std::int64_t offset = message.offset_bytes;
      for (const std::int64_t index : message.blocks) {
        if (message.buffer != BufferId::resident) {
          expect_content(index, message.buffer, offset, number);
        } else {
          expect_own_piece(block(index), offset);
        }
        offset += block(index).bytes;
      }
      for (const std::int64_t index : message.gradients) {
        expect_gradient(index, message.buffer, offset, number);
        offset += bytes_of_gradient(index);
      }
      ANNULUS_ASSERT(offset == message.offset_bytes + message.bytes, "rank {} step {}: a message's blocks and bytes disagree", plan_.rank,
                     number);
      leaving_.push_back(range_of(message.buffer, message.offset_bytes, message.bytes));
      leaving_.back().step = number;
      refuse_overlap(leaving_.back(), landing_, number);
    }
    for (const Message& message : step.receives) {
      const Range target = range_of(message.buffer, message.offset_bytes, message.bytes);
      ANNULUS_ASSERT(std::find(kSlots.begin(), kSlots.end(), message.buffer) != kSlots.end(), "rank {} receives outside its slots",
                     plan_.rank);
      refuse_overlap(target, leaving_, number);
      refuse_overlap(target, landing_, number);
      landing_.push_back(target);
      landing_.back().step = number;
      evict(target);
    }
  }

  /// The messages of `step` have come and gone.
  void wait(std::int64_t number, const Step& step) {
    for (std::vector<Range>* ranges : {&leaving_, &landing_}) {
      std::erase_if(*ranges, [&](const Range& range) { return range.step == number; });
    }
    for (const Message& message : step.receives) {
      std::int64_t offset = message.offset_bytes;
      for (const std::int64_t index : message.blocks) {
        content_[{message.buffer, offset}] = {key_of(block(index)), false, block(index).bytes};
        offset += block(index).bytes;
      }
      for (const std::int64_t index : message.gradients) {
        content_[{message.buffer, offset}] = {key_of(block(index)), true, bytes_of_gradient(index)};
        offset += bytes_of_gradient(index);
      }
    }
  }

  /// The keys of `item` are where it reads them.
  void read_keys(const WorkItem& item, std::int64_t number) const {
    if (item.keys.block >= 0) {
      expect_content(item.keys.block, item.keys.buffer, item.keys.offset_bytes, number);
      return;
    }
    std::int64_t begin = 0;  // of the piece that holds the keys
    for (const ShardPiece& piece : plan_.shard.pieces) {
      if (piece.global.contains(item.k_global[0])) { break; }
      begin += bytes_of(piece);
    }
    ANNULUS_ASSERT(item.keys.offset_bytes == begin, "rank {} step {}: own keys are read from byte {}, and begin at {}", plan_.rank, number,
                   item.keys.offset_bytes, begin);
  }

  /// The step's dK and dV begin at 0, where nothing else is in use.
  void begin_contributions(std::int64_t number, const Step& step) {
    std::vector<Range> begun;
    for (const BlockPlace& place : step.contributions) {
      const Range target = range_of(place.buffer, place.offset_bytes, bytes_of_gradient(place.block));
      ANNULUS_ASSERT(std::find(kSendBuffers.begin(), kSendBuffers.end(), place.buffer) != kSendBuffers.end(),
                     "rank {} keeps dK and dV of another's block outside its send buffers", plan_.rank);
      refuse_overlap(target, leaving_, number);
      refuse_overlap(target, landing_, number);
      refuse_overlap(target, begun, number);
      begun.push_back(target);
      evict(target);
      content_[{place.buffer, place.offset_bytes}] = {key_of(block(place.block)), true, bytes_of_gradient(place.block)};
    }
  }

  /// The dK and dV that `item` adds to are where it says, and those of its keys.
  void add_gradient(const WorkItem& item, std::int64_t number) const {
    ANNULUS_ASSERT(item.gradient.block == item.keys.block, "rank {} step {}: gradients of another block than the keys'", plan_.rank,
                   number);
    if (item.keys.block >= 0) {
      expect_gradient(item.keys.block, item.gradient.buffer, item.gradient.offset_bytes, number);
      return;
    }
    const std::int64_t expected = item.keys.offset_bytes / size_of(plan_.problem.dtype) * 4;
    ANNULUS_ASSERT(item.gradient.buffer == BufferId::own_gradient && item.gradient.offset_bytes == expected,
                   "rank {} step {}: dK and dV of own keys are added to at byte {}, and begin at {}", plan_.rank, number,
                   item.gradient.offset_bytes, expected);
  }

  /// What came is there, and what it is added to.
  void add_sums(std::int64_t number, const Step& step) {
    for (const SumItem& sum : step.sums) {
      expect_gradient(sum.block, sum.from, sum.from_offset_bytes, number);
      refuse_overlap(range_of(sum.from, sum.from_offset_bytes, bytes_of_gradient(sum.block)), landing_, number);
      if (sum.to == BufferId::own_gradient) {
        check_own_rows(sum.block, sum.to_rows);
        continue;
      }
      expect_gradient(sum.block, sum.to, sum.to_offset_bytes, number);
      refuse_overlap(range_of(sum.to, sum.to_offset_bytes, bytes_of_gradient(sum.block)), leaving_, number);
    }
  }

  /// At the end: no buffer for messages is larger than what was ever in use of it.
  void check_sizes() const {
    for (const BufferId buffer :
         {BufferId::slot_0, BufferId::slot_1, BufferId::slot_2, BufferId::slot_3, BufferId::send_0, BufferId::send_1}) {
      const auto used = used_.find(buffer);
      const std::int64_t needed = used == used_.end() ? 0 : used->second;
      ANNULUS_ASSERT(buffer_bytes(plan_, buffer) == needed, "rank {}: a buffer of {} bytes is used up to byte {}", plan_.rank,
                     buffer_bytes(plan_, buffer), needed);
    }
  }

  void check_nothing_open() const {
    ANNULUS_ASSERT(leaving_.empty() && landing_.empty(), "rank {} ends while messages travel", plan_.rank);
  }

 private:
  /// K and V of a piece of the shard.
  std::int64_t bytes_of(const ShardPiece& piece) const {
    const Problem& problem = plan_.problem;
    return 2 * problem.batch * piece.global.count * problem.kv_heads * problem.head_dim * size_of(problem.dtype);
  }
  /// A block that is sent from the resident K and V is what lies there: all heads of the piece of the shard that begins there.
  void expect_own_piece(const KvBlock& what, std::int64_t offset) const {
    std::int64_t begin = 0;
    for (const ShardPiece& piece : plan_.shard.pieces) {
      if (begin == offset) {
        ANNULUS_ASSERT(
            what.owner == plan_.rank && what.rows_global == Rows<Global>(piece.global) && what.kv_heads == range(0, plan_.problem.kv_heads),
            "rank {} sends other rows or heads as its own", plan_.rank);
        return;
      }
      begin += bytes_of(piece);
    }
    ANNULUS_ASSERT(false, "rank {} sends from byte {} of its own K and V, where no piece begins", plan_.rank, offset);
  }
  bool holds(std::int64_t index, bool gradient, BufferId buffer, std::int64_t offset) const {
    const auto found = content_.find({buffer, offset});
    return found != content_.end() && found->second.gradient == gradient && found->second.block == key_of(block(index));
  }
  void expect_content(std::int64_t index, BufferId buffer, std::int64_t offset, std::int64_t number) const {
    ANNULUS_ASSERT(holds(index, false, buffer, offset), "rank {} step {}: block {} is not where the plan reads it", plan_.rank, number,
                   index);
  }
  void expect_gradient(std::int64_t index, BufferId buffer, std::int64_t offset, std::int64_t number) const {
    ANNULUS_ASSERT(holds(index, true, buffer, offset), "rank {} step {}: dK and dV of block {} are not where the plan has them", plan_.rank,
                   number, index);
  }
  /// dK and dV are fp32.
  std::int64_t bytes_of_gradient(std::int64_t index) const { return block(index).bytes / size_of(plan_.problem.dtype) * 4; }
  Range range_of(BufferId buffer, std::int64_t offset, std::int64_t bytes) {
    ANNULUS_ASSERT(offset >= 0 && offset + bytes <= buffer_bytes(plan_, buffer), "rank {}: a range ends past its buffer", plan_.rank);
    std::int64_t& used = used_[buffer];
    used = std::max(used, offset + bytes);
    return {buffer, offset, offset + bytes, 0};
  }
  /// Whatever stood in `target` is gone from now on.
  void evict(const Range& target) {
    std::erase_if(content_, [&](const auto& entry) {
      const auto& [where, what] = entry;
      return target.overlaps({where.first, where.second, where.second + what.bytes, 0});
    });
  }
  void refuse_overlap(const Range& target, const std::vector<Range>& others, std::int64_t number) const {
    for (const Range& other : others) {
      ANNULUS_ASSERT(!target.overlaps(other), "rank {} step {}: memory is overwritten while in use", plan_.rank, number);
    }
  }

  /// The rows of the shard that a pack takes, or a sum adds to, are those of the block.
  void check_own_rows(std::int64_t index, const Rows<Local>& rows) const;

  const RingPlan& plan_;
  std::vector<Range> leaving_;  ///< being sent
  std::vector<Range> landing_;  ///< being received
  std::map<std::pair<BufferId, std::int64_t>, Content> content_;
  std::map<BufferId, std::int64_t> used_;  ///< where the last range of a buffer ends
};

void RankMemory::check_own_rows(std::int64_t index, const Rows<Local>& rows) const {
  const KvBlock& what = block(index);
  ANNULUS_ASSERT(what.owner == plan_.rank, "rank {} takes a block of rank {} for its own rows", plan_.rank, what.owner);
  ANNULUS_ASSERT(rows.count() == what.rows_global.count(), "rank {} takes {} rows for a block of {}", plan_.rank, rows.count(),
                 what.rows_global.count());
  for (std::int64_t row = 0; row < what.rows_global.count(); ++row) {
    ANNULUS_ASSERT(global_row(plan_.shard, rows[row]) == what.rows_global[row], "rank {} takes local row {} for global row {}", plan_.rank,
                   rows[row], what.rows_global[row]);
  }
}

/// Whether a work item's mask shows key `k` to query `q`, both global positions.
bool sees(kernels::Mask mask, std::int64_t q, std::int64_t k) {
  switch (mask) {
    case kernels::Mask::none:
      return true;
    case kernels::Mask::causal:
      break;
  }
  return k <= q;
}

/// How far apart rows lie around a token: past the last whole segment every row counts if the tail is dense.
std::int64_t rate_at(const Pattern& pattern, std::int64_t branch, std::int64_t seq_len, std::int64_t token) {
  const auto [w, r] = pattern.branches[branch];
  return pattern.ragged == Ragged::dense_tail && token >= seq_len / w * w ? 1 : r;
}

/// Counts how often each (branch, head, query, key) is attended.
class PairCounter {
 public:
  /// @param entry  the batch entry whose pairs it counts
  PairCounter(const Problem& problem, const Pattern& pattern, const Routing& routing, std::int64_t entry)
      : problem_(problem),
        entry_(entry),
        pattern_(pattern),
        routing_(routing),
        walked_(std::ssize(pattern.branches) * problem.heads * problem.seq_len, -1),
        zero_keys_(walked_.size(), 0),
        counts_(std::ssize(walked_) * problem.seq_len, 0),
        extra_counts_(problem.heads * problem.seq_len * problem.extra_keys, 0) {}

  /// @param shard where the item's queries are
  void attend(const WorkItem& item, const Shard& shard) {
    List<std::int64_t> keys(item.segments, 0);  // of each segment that the entry has
    for (const ItemPart& part : parts_of(problem_, item)) {
      if (entry_ < part.first_entry || entry_ >= part.first_entry + part.entries) { continue; }
      for (std::int64_t s = part.first_segment; s < part.first_segment + part.segments; ++s) {
        ANNULUS_ASSERT(std::exchange(keys.at(s), part.keys) == 0, "two parts of an item hold segment {}", s);
      }
    }
    for (std::int64_t s = 0; s < item.segments; ++s) {
      ANNULUS_ASSERT(keys_left(problem_, item, entry_, s) == keys[s], "segment {} has {} keys left and is given {}", s,
                     keys_left(problem_, item, entry_, s), keys[s]);
      const std::int64_t shift = s * item.segment_stride;
      for (std::int64_t j = 0; j < item.heads.kv.count; ++j) {
        for (std::int64_t i = 0; i < item.heads.q_per_kv; ++i) {
          const std::int64_t head = item.heads.q_first + j * item.heads.kv.stride * problem_.group_size() + i;
          ANNULUS_ASSERT(head / problem_.group_size() == item.heads.kv[j], "query head {} is given KV head {}", head, item.heads.kv[j]);
          if (problem_.is_extra(item.k_global[0])) {
            meet_extra_keys(item, head, shift, keys[s]);
          } else {
            attend_head(item, shard, head, shift, keys[s]);
          }
        }
      }
    }
  }

  /// The place that a token of an item's branch and heads has in its segment. A row that was turned over is the last of a block of its own.
  std::int64_t segment_place(const WorkItem& item, std::int64_t token) const {
    const Place place = place_of(item.branch, item.heads.q_first, token);
    return place.number(token) + (place.turned < 0 ? 0 : routing_.block_rows);
  }

  /// Every visible pair exactly once, no other at all; returns their number.
  std::int64_t check() const {
    std::int64_t pairs = std::ssize(extra_counts_);
    for (const int count : extra_counts_) { ANNULUS_ASSERT(count == 1, "a query of some head meets an extra key {} times", count); }
    for (std::int64_t branch = 0; branch < std::ssize(pattern_.branches); ++branch) {
      for (std::int64_t head = 0; head < problem_.heads; ++head) {
        for (std::int64_t q = 0; q < problem_.seq_len; ++q) {
          const std::int64_t zeros = runs(branch, head) && inside(branch, head, q) ? zero_keys(branch, head, q) : 0;
          ANNULUS_ASSERT(zero_keys_[row_index(branch, head, q)] == zeros, "branch {} head {} query {} sees {} keys of zeros instead of {}",
                         branch, head, q, zero_keys_[row_index(branch, head, q)], zeros);
          for (std::int64_t k = 0; k < problem_.seq_len; ++k) {
            const int expected = visible(branch, head, q, k) ? 1 : 0;
            ANNULUS_ASSERT(counts_[index(branch, head, q, k)] == expected,
                           "branch {} head {} query {} key {} attended {} times instead of {}", branch, head, q, k,
                           counts_[index(branch, head, q, k)], expected);
            pairs += expected;
          }
        }
      }
    }
    return pairs;
  }

 private:
  std::int64_t index(std::int64_t branch, std::int64_t head, std::int64_t q, std::int64_t k) const {
    return row_index(branch, head, q) * problem_.seq_len + k;
  }

  std::int64_t row_index(std::int64_t branch, std::int64_t head, std::int64_t q) const {
    return (branch * problem_.heads + head) * problem_.seq_len + q;
  }

  void meet_extra_keys(const WorkItem& item, std::int64_t head, std::int64_t shift, std::int64_t keys) {
    ANNULUS_ASSERT(item.zero_keys == 0, "extra keys with keys of zeros");
    for (std::int64_t q = 0; q < item.q_global.count(); ++q) {
      for (std::int64_t k = 0; k < keys; ++k) {
        if (!sees(item.mask, item.q_global[q], item.k_global[k])) { continue; }
        const std::int64_t row = head * problem_.seq_len + item.q_global[q] + shift;
        ++extra_counts_[row * problem_.extra_keys + item.k_global[k] - problem_.seq_len];
      }
    }
  }

  void attend_head(const WorkItem& item, const Shard& shard, std::int64_t head, std::int64_t shift, std::int64_t keys) {
    for (std::int64_t q = 0; q < item.q_global.count(); ++q) {
      zero_keys_[row_index(item.branch, head, item.q_global[q] + shift)] += item.zero_keys;
      const Place place = routing_.key_order == KeyOrder::cyclic ? place_of(item.branch, head, item.q_global[q] + shift) : Place{};
      std::int64_t nearest = -1;
      std::int64_t farthest = -1;
      for (std::int64_t k = 0; k < keys; ++k) {
        if (!sees(item.mask, item.q_global[q], item.k_global[k]) || !has_part(item, q, k)) { continue; }
        if (routing_.key_order == KeyOrder::cyclic) {
          const std::int64_t distance = walk_distance(place, item.k_global[k] + shift);
          nearest = nearest < 0 ? distance : std::min(nearest, distance);
          farthest = std::max(farthest, distance);
        }
        ++counts_[index(item.branch, head, item.q_global[q] + shift, item.k_global[k] + shift)];
      }
      if (farthest < 0 || cuts_block(shard, place)) { continue; }
      std::int64_t& walked = walked_[row_index(item.branch, head, item.q_global[q] + shift)];
      ANNULUS_ASSERT(nearest > walked, "branch {} head {} query {} meets its keys in another order than on one rank", item.branch, head,
                     item.q_global[q] + shift);
      walked = farthest;
    }
  }

  /// Whether the item's part of the keys holds key `k` for query `q`, both counted in the item.
  bool has_part(const WorkItem& item, std::int64_t q, std::int64_t k) const {
    if (item.place.part == kernels::KeyPart::all) { return true; }
    const bool down = item.place.k_first + k < ((item.place.q_first + q) / routing_.block_rows + 1) * routing_.block_rows;
    return down == (item.place.part == kernels::KeyPart::down);
  }

  /// A query's segment and block, in rows that the branch selects. They are numbered from 0, and the row that was turned over, if one was,
  /// is number -1 and a block by itself.
  struct Place {
    std::int64_t turned = -1;    ///< token of the row that was turned over
    std::int64_t first = 0;      ///< token of row 0
    std::int64_t rate = 1;       ///< tokens to row 1
    std::int64_t rows = 0;       ///< from row 0 on
    std::int64_t block_end = 0;  ///< of the query's block

    std::int64_t number(std::int64_t token) const { return token == turned ? -1 : (token - first) / rate; }
    std::int64_t token(std::int64_t number) const { return number < 0 ? turned : first + number * rate; }
    std::int64_t lowest() const { return turned < 0 ? 0 : -1; }
  };
  Place place_of(std::int64_t branch, std::int64_t head, std::int64_t q) const {
    const std::int64_t w = pattern_.branches[branch].segment_length;
    Place place;
    place.rate = rate_at(pattern_, branch, problem_.seq_len, q);
    place.first = q / w * w;
    const std::int64_t end = std::min(place.first + w, problem_.seq_len);
    while (!inside(branch, head, place.first)) { ++place.first; }
    const std::int64_t start = q / w * w + offset(branch, head, q);
    if (pattern_.ragged == Ragged::wrap && place.first < start && start < end) { place.turned = std::exchange(place.first, start); }
    place.rows = (end - 1 - place.first) / place.rate + 1;
    const std::int64_t number = place.number(q);
    place.block_end = number < 0 ? 0 : std::min(place.rows, (number / routing_.block_rows + 1) * routing_.block_rows);
    return place;
  }

  /// How many keys of its segment a query meets before key `k` on one rank, from the definition: it starts at the end of its block, goes
  /// down to the segment's first row, and on from the last. The key is a token that the branch selects.
  /// @param place  of the query
  static std::int64_t walk_distance(const Place& place, std::int64_t k) {
    const std::int64_t at = place.number(k);
    return at < place.block_end ? place.block_end - 1 - at : place.block_end - place.lowest() + place.rows - 1 - at;
  }

  /// Whether the shard ends inside the query's block: the query's order of keys cannot be that of one rank then.
  static bool cuts_block(const Shard& shard, const Place& place) {
    const std::int64_t last = place.token(place.block_end - 1);
    return std::none_of(shard.pieces.begin(), shard.pieces.end(), [&](const ShardPiece& piece) { return piece.global.contains(last); });
  }

  bool runs(std::int64_t branch, std::int64_t head) const {
    if (pattern_.head_split == HeadSplit::all) { return true; }
    const auto branches = static_cast<std::int64_t>(pattern_.branches.size());
    std::int64_t begin = 0;
    for (std::int64_t g = 0; g < branches; ++g) {
      const std::int64_t spare = problem_.all_heads() % branches;
      const bool larger = pattern_.head_split == HeadSplit::first ? g < spare : g >= branches - spare;
      const std::int64_t size = problem_.all_heads() / branches + (larger ? 1 : 0);
      const std::int64_t number = problem_.window.first + head;
      if (g == static_cast<std::int64_t>(branch)) { return number >= begin && number < begin + size; }
      begin += size;
    }
    return false;
  }

  /// Of the segment that holds `token`.
  std::int64_t offset(std::int64_t branch, std::int64_t head, std::int64_t token) const {
    const std::int64_t r = rate_at(pattern_, branch, problem_.seq_len, token);
    const std::int64_t segment = token / pattern_.branches[branch].segment_length;
    const auto g = static_cast<std::int64_t>(branch);
    const std::int64_t kv_heads = problem_.all_kv_heads();
    const std::int64_t kv_head = (problem_.window.first + head) * kv_heads / problem_.all_heads();
    const std::int64_t raw = pattern_.offset == OffsetRule::group                ? g
                             : pattern_.offset == OffsetRule::group_plus_segment ? g + segment
                             : pattern_.offset == OffsetRule::segment            ? segment
                             : pattern_.offset == OffsetRule::head               ? kv_head
                                                                                 : kv_head / ((kv_heads + r - 1) / r);
    return raw % r;
  }

  bool inside(std::int64_t branch, std::int64_t head, std::int64_t token) const {
    const std::int64_t w = pattern_.branches[branch].segment_length;
    const std::int64_t r = rate_at(pattern_, branch, problem_.seq_len, token);
    const std::int64_t length = std::min(w, problem_.seq_len - token / w * w);
    const std::int64_t distance = token % w - offset(branch, head, token);
    if (pattern_.ragged == Ragged::wrap) { return wraps_to(distance, r, length); }
    if (distance < 0 || distance % r != 0) { return false; }
    return pattern_.ragged != Ragged::truncate || distance / r < length / r;
  }

  /// Whether t * r is `distance` modulo the length of a segment, for one of its ceil(length / r) numbers t.
  static bool wraps_to(std::int64_t distance, std::int64_t r, std::int64_t length) {
    if (r >= length) { return distance % length == 0; }
    const std::int64_t ahead = distance < 0 ? distance + length : distance;
    return ahead % r == 0 && ahead / r < (length + r - 1) / r;
  }

  /// Slots of the query's segment, as one that begins at token 0 has them, that hold none of its tokens.
  std::int64_t zero_keys(std::int64_t branch, std::int64_t head, std::int64_t q) const {
    if (pattern_.ragged != Ragged::zero_keys || problem_.causal) { return 0; }
    const auto [w, r] = pattern_.branches[branch];
    std::int64_t first = q / w * w;
    const std::int64_t end = std::min(first + w, problem_.seq_len);
    while (!inside(branch, head, first)) { ++first; }
    std::int64_t empty = 0;
    for (std::int64_t slot = 0; slot * r < std::min(w, problem_.seq_len); ++slot) { empty += first + slot * r < end ? 0 : 1; }
    return empty;
  }

  bool visible(std::int64_t branch, std::int64_t head, std::int64_t q, std::int64_t k) const {
    const std::int64_t w = pattern_.branches[branch].segment_length;
    return runs(branch, head) && q / w == k / w && inside(branch, head, q) && inside(branch, head, k) && (!problem_.causal || k <= q) &&
           k < problem_.kv_length(entry_);
  }

  const Problem& problem_;
  std::int64_t entry_;
  const Pattern& pattern_;
  const Routing& routing_;
  List<std::int64_t> walked_;     ///< by branch, head and query: how far along its order of keys it has come
  List<std::int64_t> zero_keys_;  ///< the same: keys of zeros so far
  List<int> counts_;
  List<int> extra_counts_;  ///< by head, query and extra key
};

/// Every token must be a local row of one rank, and every local row of a rank one token.
void check_shards(std::span<const RingPlan> plans) {
  List<int> owners(plans.front().problem.seq_len, 0);
  for (const RingPlan& plan : plans) {
    std::int64_t rows = 0;
    for (const ShardPiece& piece : plan.shard.pieces) { rows += piece.global.count; }
    ANNULUS_ASSERT(rows == plan.local_rows, "the pieces of rank {} hold {} rows, its shard {}", plan.rank, rows, plan.local_rows);
    for (std::int64_t local = 0; local < plan.local_rows; ++local) {
      const std::int64_t row = global_row(plan.shard, local);
      ANNULUS_ASSERT(row >= 0 && row < plan.problem.seq_len, "local row {} of rank {} lies in no piece of its shard", local, plan.rank);
      ++owners[row];
    }
  }
  for (std::size_t row = 0; row < owners.size(); ++row) {
    ANNULUS_ASSERT(owners[row] == 1, "global row {} is owned {} times", row, owners[row]);
  }
}

/// An item's place in its segment must be what its rows say.
void check_place(const RingPlan& plan, const PairCounter& pairs, const WorkItem& item, KeyOrder order) {
  if (order != KeyOrder::cyclic || plan.problem.is_extra(item.k_global[0])) {
    ANNULUS_ASSERT(item.place == kernels::SegmentPlace{}, "rank {}: a place where there is no order of keys", plan.rank);
    return;
  }
  const std::int64_t q = item.q_global[0];
  const std::int64_t k = item.k_global[0];
  const std::int64_t q_place = pairs.segment_place(item, q);
  const std::int64_t k_place = pairs.segment_place(item, k);
  ANNULUS_ASSERT(item.place.block_rows == plan.routing.block_rows && item.place.q_first == q_place && item.place.k_first == k_place,
                 "rank {}: query {} and key {} are not at places {} and {} of their segment", plan.rank, q, k, item.place.q_first,
                 item.place.k_first);
}

/// The rows and keys that a work item uses must be those it says, in the block or shard it says.
void check_stored_rows(const RingPlan& plan, const WorkItem& item) {
  ANNULUS_ASSERT(item.q_local.count() == item.q_global.count(), "{} local query rows are {} global ones", item.q_local.count(),
                 item.q_global.count());
  for (std::int64_t row = 0; row < item.q_global.count(); ++row) {
    ANNULUS_ASSERT(global_row(plan.shard, item.q_local[row]) == item.q_global[row], "local query row {} is not global row {}",
                   item.q_local[row], item.q_global[row]);
  }
  const bool resident = item.keys.block < 0;
  const std::int64_t stored = resident ? item.k_local.count() : item.k_packed.count();
  ANNULUS_ASSERT(stored == item.k_global.count() && (resident ? item.k_packed.empty() : item.k_local.empty()),
                 "{} stored key rows are {} global ones", stored, item.k_global.count());
  for (std::int64_t row = 0; row < item.k_global.count(); ++row) {
    const std::int64_t found =
        resident ? global_row(plan.shard, item.k_local[row]) : plan.blocks.at(item.keys.block).rows_global[item.k_packed[row]];
    ANNULUS_ASSERT(found == item.k_global[row], "stored key row number {} is not global row {}", row, item.k_global[row]);
  }
}

/// Items of one wave must touch disjoint rows of the partials, and waves must ascend.
class WaveCheck {
 public:
  explicit WaveCheck(const RingPlan& plan) : plan_(plan), last_wave_(plan.partials * plan.problem.heads * plan.local_rows, -1) {}

  /// The items of one step.
  void attend(const Step& step) {
    std::fill(last_wave_.begin(), last_wave_.end(), -1);
    std::int64_t wave = 0;
    for (const WorkItem& item : step.work) {
      ANNULUS_ASSERT(item.wave >= wave, "rank {}: wave {} after wave {}", plan_.rank, item.wave, wave);
      wave = item.wave;
      ANNULUS_ASSERT(item.partial >= 0 && item.partial < plan_.partials, "rank {} has no partial {}", plan_.rank, item.partial);
      const bool is_extra = plan_.problem.is_extra(item.k_global[0]);
      ANNULUS_ASSERT(is_extra == (item.partial == plan_.extra_partial) || plan_.extra_partial < 0,
                     "rank {}: partial {} holds extra keys and others", plan_.rank, item.partial);
      for (std::int64_t j = 0; j < item.heads.kv.count; ++j) {
        for (std::int64_t i = 0; i < item.heads.q_per_kv; ++i) {
          touch(item, item.heads.q_first + j * item.heads.kv.stride * plan_.problem.group_size() + i);
        }
      }
    }
  }

 private:
  void touch(const WorkItem& item, std::int64_t head) {
    for (std::int64_t s = 0; s < item.segments; ++s) {
      for (std::int64_t row = 0; row < item.q_local.count(); ++row) {
        const std::int64_t at = item.q_local[row] + s * item.segment_stride;
        std::int64_t& last = last_wave_[(item.partial * plan_.problem.heads + head) * plan_.local_rows + at];
        ANNULUS_ASSERT(last < item.wave, "rank {}: two items of wave {} fold into local row {} of head {}", plan_.rank, item.wave, at,
                       head);
        last = item.wave;
      }
    }
  }

  const RingPlan& plan_;
  List<std::int64_t> last_wave_;  ///< by partial, head and local row
};

/// Items of one wave of the backward pass must touch disjoint rows of dQ, and of dK and dV, and waves must ascend.
class GradientWaveCheck {
 public:
  explicit GradientWaveCheck(const RingPlan& plan) : plan_(plan) {}

  /// The items of one step.
  void differentiate(const Step& step) {
    queries_.clear();
    keys_.clear();
    std::int64_t wave = 0;
    for (const WorkItem& item : step.work) {
      ANNULUS_ASSERT(item.wave >= wave, "rank {}: wave {} after wave {}", plan_.rank, item.wave, wave);
      wave = item.wave;
      ANNULUS_ASSERT(item.partial >= 0 && item.partial < plan_.partials, "rank {} has no partial {}", plan_.rank, item.partial);
      for (std::int64_t s = 0; s < item.segments; ++s) {
        const std::int64_t shift = s * item.segment_stride;
        for (std::int64_t j = 0; j < item.heads.kv.count; ++j) {
          for (std::int64_t i = 0; i < item.heads.q_per_kv; ++i) {
            const std::int64_t head = item.heads.q_first + j * item.heads.kv.stride * plan_.problem.group_size() + i;
            touch(queries_, head, item.q_global, shift, wave);
          }
          touch(keys_, item.heads.kv[j], item.k_global, shift, wave);
        }
      }
    }
  }

 private:
  /// Rows by head and global number, whose dK and dV lie in one place: a rank has a block of them once, or the rows themselves.
  using Waves = std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t>;
  void touch(Waves& waves, std::int64_t head, const Rows<Global>& rows, std::int64_t shift, std::int64_t wave) const {
    for (std::int64_t row = 0; row < rows.count(); ++row) {
      const auto [found, is_new] = waves.try_emplace({head, rows[row] + shift}, wave);
      ANNULUS_ASSERT(is_new || found->second < wave, "rank {}: two items of wave {} add to row {} of head {}", plan_.rank, wave,
                     rows[row] + shift, head);
      found->second = wave;
    }
  }

  const RingPlan& plan_;
  Waves queries_;
  Waves keys_;
};

/// Message of `step` from or to `peer`, or null.
const Message* find_message(const std::vector<Message>& messages, std::int64_t peer) {
  const auto found = std::find_if(messages.begin(), messages.end(), [&](const Message& message) { return message.peer == peer; });
  return found == messages.end() ? nullptr : &*found;
}

void check_messages_fit(std::span<const RingPlan> plans, std::int64_t number) {
  for (const RingPlan& plan : plans) {
    const Step& step = step_or_empty(plan, number);
    for (const Message& sent : step.sends) {
      const RingPlan& peer = plans[sent.peer];
      const Message* received = find_message(step_or_empty(peer, number).receives, plan.rank);
      ANNULUS_ASSERT(received != nullptr && received->bytes == sent.bytes && received->blocks.size() == sent.blocks.size() &&
                         received->gradients.size() == sent.gradients.size(),
                     "step {}: rank {} sends to {} what it does not expect", number, plan.rank, sent.peer);
      for (std::size_t i = 0; i < sent.blocks.size(); ++i) {
        ANNULUS_ASSERT(key_of(plan.blocks[sent.blocks[i]]) == key_of(peer.blocks[received->blocks[i]]),
                       "step {}: message {} -> {} differs in block {}", number, plan.rank, sent.peer, i);
      }
      for (std::size_t i = 0; i < sent.gradients.size(); ++i) {
        ANNULUS_ASSERT(key_of(plan.blocks[sent.gradients[i]]) == key_of(peer.blocks[received->gradients[i]]),
                       "step {}: message {} -> {} differs in dK and dV number {}", number, plan.rank, sent.peer, i);
      }
    }
    for (const Message& received : step.receives) {
      ANNULUS_ASSERT(find_message(step_or_empty(plans[received.peer], number).sends, plan.rank) != nullptr,
                     "step {}: rank {} waits for rank {} in vain", number, plan.rank, received.peer);
    }
  }
}

/// Turns ascend; each step's messages are packed, then posted, then waited for, once and in the order of the steps; a step with messages to
/// wait for is attended after that. In the backward pass, what a step's messages brought of gradients is added before the next step's are
/// packed, and the step differentiated. Every rank finishes once, after all attending and before all differentiating, and where there are
/// gradients finishes them last.
void check_order(const RingPlan& plan) {
  const std::int64_t steps = std::ssize(plan.steps);
  const std::int64_t forward = plan.forward_steps;
  ANNULUS_ASSERT(plan.routing.gradients ? forward < steps : forward == steps, "rank {}: {} steps of {} are of the forward pass", plan.rank,
                 forward, steps);
  std::map<OpKind, std::int64_t> next{{OpKind::pack, 1},
                                      {OpKind::post, 1},
                                      {OpKind::wait, 1},
                                      {OpKind::attend, 0},
                                      {OpKind::accumulate, forward},
                                      {OpKind::differentiate, forward}};
  bool finished = false;
  bool ended = false;
  std::int64_t turn = 0;
  for (const Op& op : plan.ops) {
    ANNULUS_ASSERT(op.turn >= turn && !ended, "rank {}: an op of turn {} comes after turn {} or after the end", plan.rank, op.turn, turn);
    turn = op.turn;
    if (op.kind == OpKind::finish) {
      ANNULUS_ASSERT(!finished && next[OpKind::attend] == forward, "rank {} finishes after {} of {} steps", plan.rank, next[OpKind::attend],
                     forward);
      finished = true;
      ended = !plan.routing.gradients;
      continue;
    }
    if (op.kind == OpKind::finish_gradients) {
      ended = finished && next[OpKind::differentiate] == steps;
      ANNULUS_ASSERT(ended && plan.routing.gradients, "rank {} finishes gradients too early", plan.rank);
      continue;
    }
    ANNULUS_ASSERT(op.step == next.at(op.kind) && op.step < steps, "rank {}: an op of step {} is out of order", plan.rank, op.step);
    const auto done = [&](OpKind kind) { return next[kind] > op.step; };
    bool ready = true;
    switch (op.kind) {
      case OpKind::pack:
        // What came in the step before is added to what leaves in this one.
        ready = op.step <= forward || next[OpKind::accumulate] == op.step;
        break;
      case OpKind::post:
        ready = done(OpKind::pack);
        break;
      case OpKind::wait:
        ready = done(OpKind::post);
        break;
      case OpKind::attend:
        ready = op.step < forward && done(OpKind::wait);
        break;
      case OpKind::accumulate:
        ready = done(OpKind::wait) && next[OpKind::differentiate] == op.step;
        break;
      case OpKind::differentiate:
        ready = finished && done(OpKind::accumulate);
        break;
      case OpKind::finish:
      case OpKind::finish_gradients:
        break;
    }
    ANNULUS_ASSERT(ready, "rank {} step {}: an op comes before what it needs", plan.rank, op.step);
    ++next[op.kind];
  }
  const bool complete = ended && next[OpKind::pack] == std::max<std::int64_t>(steps, 1) && next[OpKind::post] == next[OpKind::pack] &&
                        next[OpKind::wait] == next[OpKind::pack] && next[OpKind::attend] == forward && next[OpKind::accumulate] == steps &&
                        next[OpKind::differentiate] == steps;
  ANNULUS_ASSERT(complete, "rank {} leaves out a part of its {} steps", plan.rank, steps);
}

/// Ranks that take turns never wait for a message that nobody has posted: every post of a step has a smaller turn than any wait for it.
void check_turns(std::span<const RingPlan> plans) {
  std::map<std::int64_t, std::int64_t> last_post;
  for (const RingPlan& plan : plans) {
    for (const Op& op : plan.ops) {
      if (op.kind == OpKind::post) { last_post[op.step] = std::max(last_post[op.step], op.turn); }
    }
  }
  for (const RingPlan& plan : plans) {
    for (const Op& op : plan.ops) {
      ANNULUS_ASSERT(op.kind != OpKind::wait || op.turn > last_post[op.step],
                     "rank {} waits for step {} in turn {}, and it is posted in turn {}", plan.rank, op.step, op.turn, last_post[op.step]);
    }
  }
}

/// What comes between two steps is used between them.
void check_blocks_used(const RingPlan& plan, std::int64_t first, std::int64_t end) {
  if (plan.routing.schedule == Schedule::ring_full) { return; }
  List<bool> used(plan.blocks.size(), false);
  for (std::int64_t number = first; number < end; ++number) {
    for (const WorkItem& item : plan.steps[number].work) {
      if (item.keys.block >= 0) { used[item.keys.block] = true; }
    }
  }
  for (std::int64_t number = first; number < end; ++number) {
    for (const Message& message : plan.steps[number].receives) {
      for (const std::int64_t index : message.blocks) {
        ANNULUS_ASSERT(used[index], "rank {} receives block {} and does not use it", plan.rank, index);
      }
    }
  }
}

}  // namespace

Coverage prove_coverage(std::span<const RingPlan> plans) {
  Coverage coverage;
  ANNULUS_EXPECTS(!plans.empty(), "no plans to prove");
  for (const RingPlan& plan : plans) { coverage.steps = std::max(coverage.steps, std::ssize(plan.steps)); }
  const Problem& problem = plans.front().problem;
  const std::int64_t alike = problem.kv_lengths.empty() ? problem.batch : 1;  // batch entries that one counter stands for
  std::vector<PairCounter> pairs;
  for (std::int64_t entry = 0; entry < problem.batch; entry += alike) {
    pairs.emplace_back(problem, plans.front().pattern, plans.front().routing, entry);
  }
  Routing as_it_comes = plans.front().routing;  // gradients have no order of keys
  as_it_comes.key_order = KeyOrder::arrival;
  std::vector<PairCounter> gradient_pairs;
  for (std::int64_t entry = 0; plans.front().routing.gradients && entry < problem.batch; entry += alike) {
    gradient_pairs.emplace_back(problem, plans.front().pattern, as_it_comes, entry);
  }
  check_shards(plans);
  check_turns(plans);
  for (std::int64_t number = 0; number < coverage.steps; ++number) { check_messages_fit(plans, number); }
  for (const RingPlan& plan : plans) {
    ANNULUS_ASSERT(plan.routing == plans.front().routing && plan.forward_steps >= 1, "rank {} plans for another routing", plan.rank);
    check_order(plan);
    check_blocks_used(plan, 0, plan.forward_steps);
    check_blocks_used(plan, plan.forward_steps, std::ssize(plan.steps));
    RankMemory memory(plan);
    WaveCheck waves(plan);
    GradientWaveCheck gradient_waves(plan);
    for (const Op& op : plan.ops) {
      const Step& step = plan.steps[op.step];
      switch (op.kind) {
        case OpKind::pack:
          memory.pack(op.step, step);
          break;
        case OpKind::post:
          memory.post(op.step, step);
          for (const Message& message : step.sends) { coverage.bytes_moved += message.bytes; }
          break;
        case OpKind::wait:
          memory.wait(op.step, step);
          break;
        case OpKind::attend:
          waves.attend(step);
          for (const WorkItem& item : step.work) {
            memory.read_keys(item, op.step);
            check_stored_rows(plan, item);
            check_place(plan, pairs.front(), item, plan.routing.key_order);
            for (PairCounter& of_entry : pairs) { of_entry.attend(item, plan.shard); }
          }
          break;
        case OpKind::accumulate:
          memory.add_sums(op.step, step);
          break;
        case OpKind::differentiate:
          gradient_waves.differentiate(step);
          memory.begin_contributions(op.step, step);
          for (const WorkItem& item : step.work) {
            memory.read_keys(item, op.step);
            memory.add_gradient(item, op.step);
            check_stored_rows(plan, item);
            check_place(plan, gradient_pairs.front(), item, KeyOrder::arrival);
            for (PairCounter& of_entry : gradient_pairs) { of_entry.attend(item, plan.shard); }
          }
          break;
        case OpKind::finish:
        case OpKind::finish_gradients:
          break;
      }
    }
    memory.check_nothing_open();
    memory.check_sizes();
  }
  for (const PairCounter& of_entry : pairs) { coverage.pairs += alike * of_entry.check(); }
  for (const PairCounter& of_entry : gradient_pairs) { coverage.gradient_pairs += alike * of_entry.check(); }
  if (!gradient_pairs.empty()) { planning::prove_gradient_flow(plans); }
  return coverage;
}

}  // namespace annulus
