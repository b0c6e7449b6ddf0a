// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/coverage.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

namespace annulus {

namespace {

/// What identifies a block to all ranks.
using BlockKey = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

BlockKey key_of(const KvBlock& block) {
  return {block.branch, block.head_class, block.segment, block.owner, block.rows_global.first, block.rows_global.count, block.bytes};
}

/// A byte range of one buffer.
struct Range {
  BufferId buffer = BufferId::resident;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  bool overlaps(const Range& other) const { return buffer == other.buffer && begin < other.end && other.begin < end; }
};

/// The state of one rank's memory while its plan runs.
class RankMemory {
 public:
  explicit RankMemory(const RingPlan& plan) : plan_(plan) {}

  const KvBlock& block(std::int64_t index) const { return plan_.blocks.at(static_cast<std::size_t>(index)); }

  /// Packs and posts of `number`, while the work of the step before has yet to run.
  void post(std::int64_t number, const Step& step, const Step& pending) {
    std::vector<Range> reads;
    for (const WorkItem& item : pending.work) {
      if (item.keys.block >= 0) { reads.push_back(range_of(item.keys.buffer, item.keys.offset_bytes, block(item.keys.block).bytes)); }
    }
    std::vector<Range> writes;
    for (const PackItem& pack : step.packs) {
      const KvBlock& what = block(pack.block);
      if (pack.from == BufferId::resident) {
        ANNULUS_ASSERT(what.owner == plan_.rank, "rank {} packs a block of rank {} from its own rows", plan_.rank, what.owner);
      } else {
        expect_content(pack.block, pack.from, pack.from_offset_bytes, number);
      }
      const Range target = range_of(pack.to, pack.to_offset_bytes, what.bytes);
      refuse_overlap(target, reads, number);
      refuse_overlap(target, writes, number);
      writes.push_back(target);
      evict(target);
      content_[{pack.to, pack.to_offset_bytes}] = key_of(what);
    }
    for (const Message& message : step.sends) {
      std::int64_t offset = message.offset_bytes;
      for (const std::int64_t index : message.blocks) {
        if (message.buffer != BufferId::resident) {
          expect_content(index, message.buffer, offset, number);
        } else {
          ANNULUS_ASSERT(block(index).owner == plan_.rank, "rank {} sends rows of rank {} as its own", plan_.rank, block(index).owner);
        }
        offset += block(index).bytes;
      }
      ANNULUS_ASSERT(offset == message.offset_bytes + message.bytes, "rank {} step {}: a message's blocks and bytes disagree", plan_.rank,
                     number);
      reads.push_back(range_of(message.buffer, message.offset_bytes, message.bytes));
    }
    for (const Message& message : step.receives) {
      const Range target = range_of(message.buffer, message.offset_bytes, message.bytes);
      ANNULUS_ASSERT(message.buffer == BufferId::slot_0 || message.buffer == BufferId::slot_1, "rank {} receives outside its slots",
                     plan_.rank);
      refuse_overlap(target, reads, number);
      refuse_overlap(target, writes, number);
      writes.push_back(target);
      evict(target);
    }
  }

  /// The receives of `step` have arrived.
  void arrive(const Step& step) {
    for (const Message& message : step.receives) {
      std::int64_t offset = message.offset_bytes;
      for (const std::int64_t index : message.blocks) {
        content_[{message.buffer, offset}] = key_of(block(index));
        offset += block(index).bytes;
      }
    }
  }

  /// At the end: no buffer for messages is larger than what was ever in use of it.
  void check_sizes() const {
    for (const BufferId buffer : {BufferId::slot_0, BufferId::slot_1, BufferId::send_0, BufferId::send_1}) {
      const auto used = used_.find(buffer);
      const std::int64_t needed = used == used_.end() ? 0 : used->second;
      ANNULUS_ASSERT(buffer_bytes(plan_, buffer) == needed, "rank {}: a buffer of {} bytes is used up to byte {}", plan_.rank,
                     buffer_bytes(plan_, buffer), needed);
    }
  }

  void expect_content(std::int64_t index, BufferId buffer, std::int64_t offset, std::int64_t number) const {
    const auto found = content_.find({buffer, offset});
    ANNULUS_ASSERT(found != content_.end() && found->second == key_of(block(index)),
                   "rank {} step {}: block {} is not where the plan reads it", plan_.rank, number, index);
  }

 private:
  Range range_of(BufferId buffer, std::int64_t offset, std::int64_t bytes) {
    ANNULUS_ASSERT(offset >= 0 && offset + bytes <= buffer_bytes(plan_, buffer), "rank {}: a range ends past its buffer", plan_.rank);
    std::int64_t& used = used_[buffer];
    used = std::max(used, offset + bytes);
    return {buffer, offset, offset + bytes};
  }
  /// Whatever stood in `target` is gone from now on.
  void evict(const Range& target) {
    std::erase_if(content_, [&](const auto& entry) {
      const auto& [where, what] = entry;
      return target.overlaps({where.first, where.second, where.second + std::get<6>(what)});
    });
  }
  void refuse_overlap(const Range& target, const std::vector<Range>& others, std::int64_t number) const {
    for (const Range& other : others) {
      ANNULUS_ASSERT(!target.overlaps(other), "rank {} step {}: memory is overwritten while in use", plan_.rank, number);
    }
  }

  const RingPlan& plan_;
  std::map<std::pair<BufferId, std::int64_t>, BlockKey> content_;
  std::map<BufferId, std::int64_t> used_;  ///< where the last range of a buffer ends
};

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

/// Counts how often each (branch, head, query, key) is attended.
class PairCounter {
 public:
  PairCounter(const Problem& problem, const Pattern& pattern)
      : problem_(problem),
        pattern_(pattern),
        counts_(pattern.branches.size() * static_cast<std::size_t>(problem.heads * problem.seq_len * problem.seq_len), 0) {}

  void attend(const WorkItem& item) {
    for (std::int64_t s = 0; s < item.segments; ++s) {
      const std::int64_t shift = s * item.segment_stride;
      for (std::int64_t j = 0; j < item.heads.kv.count; ++j) {
        for (std::int64_t i = 0; i < item.heads.q_per_kv; ++i) {
          const std::int64_t head = item.heads.q_first + j * item.heads.kv.stride * problem_.group_size() + i;
          ANNULUS_ASSERT(head / problem_.group_size() == item.heads.kv[j], "query head {} is given KV head {}", head, item.heads.kv[j]);
          attend_head(item, head, shift);
        }
      }
    }
  }

  /// Every visible pair exactly once, no other at all; returns their number.
  std::int64_t check() const {
    std::int64_t pairs = 0;
    for (std::size_t branch = 0; branch < pattern_.branches.size(); ++branch) {
      for (std::int64_t head = 0; head < problem_.heads; ++head) {
        for (std::int64_t q = 0; q < problem_.seq_len; ++q) {
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
  std::size_t index(std::size_t branch, std::int64_t head, std::int64_t q, std::int64_t k) const {
    return static_cast<std::size_t>(
        ((static_cast<std::int64_t>(branch) * problem_.heads + head) * problem_.seq_len + q) * problem_.seq_len + k);
  }

  void attend_head(const WorkItem& item, std::int64_t head, std::int64_t shift) {
    for (std::int64_t q = 0; q < item.q_global.count; ++q) {
      for (std::int64_t k = 0; k < item.k_global.count; ++k) {
        if (!sees(item.mask, item.q_global[q], item.k_global[k])) { continue; }
        ++counts_[index(static_cast<std::size_t>(item.branch), head, item.q_global[q] + shift, item.k_global[k] + shift)];
      }
    }
  }

  bool runs(std::size_t branch, std::int64_t head) const {
    if (pattern_.head_split == HeadSplit::all) { return true; }
    const auto branches = static_cast<std::int64_t>(pattern_.branches.size());
    std::int64_t begin = 0;
    for (std::int64_t g = 0; g < branches; ++g) {
      const std::int64_t spare = problem_.heads % branches;
      const bool larger = pattern_.head_split == HeadSplit::first ? g < spare : g >= branches - spare;
      const std::int64_t size = problem_.heads / branches + (larger ? 1 : 0);
      if (g == static_cast<std::int64_t>(branch)) { return head >= begin && head < begin + size; }
      begin += size;
    }
    return false;
  }

  bool inside(std::size_t branch, std::int64_t head, std::int64_t token) const {
    const auto [w, r] = pattern_.branches[branch];
    const std::int64_t segment = token / w;
    const auto g = static_cast<std::int64_t>(branch);
    const std::int64_t kv_head = head * problem_.kv_heads / problem_.heads;
    const std::int64_t raw = pattern_.offset == OffsetRule::group                ? g
                             : pattern_.offset == OffsetRule::group_plus_segment ? g + segment
                             : pattern_.offset == OffsetRule::segment            ? segment
                                                                                 : kv_head;
    const std::int64_t distance = token - segment * w - raw % r;
    return distance >= 0 && distance % r == 0;
  }

  bool visible(std::size_t branch, std::int64_t head, std::int64_t q, std::int64_t k) const {
    const std::int64_t w = pattern_.branches[branch].segment_length;
    return runs(branch, head) && q / w == k / w && inside(branch, head, q) && inside(branch, head, k) && (!problem_.causal || k <= q);
  }

  const Problem& problem_;
  const Pattern& pattern_;
  std::vector<int> counts_;
};

/// The global row that a rank keeps as its local row, through whichever piece of its shard holds that; -1 if none does.
std::int64_t global_row(const Shard& shard, std::int64_t local) {
  for (const ShardPiece& piece : shard.pieces) {
    const std::int64_t at = local - piece.local_first;
    if (at >= 0 && at < piece.global.count) { return piece.global[at]; }
  }
  return -1;
}

/// Every token must be a local row of one rank, and every local row of a rank one token.
void check_shards(std::span<const RingPlan> plans) {
  std::vector<int> owners(static_cast<std::size_t>(plans.front().problem.seq_len), 0);
  for (const RingPlan& plan : plans) {
    std::int64_t rows = 0;
    for (const ShardPiece& piece : plan.shard.pieces) { rows += piece.global.count; }
    ANNULUS_ASSERT(rows == plan.local_rows, "the pieces of rank {} hold {} rows, its shard {}", plan.rank, rows, plan.local_rows);
    for (std::int64_t local = 0; local < plan.local_rows; ++local) {
      const std::int64_t row = global_row(plan.shard, local);
      ANNULUS_ASSERT(row >= 0 && row < plan.problem.seq_len, "local row {} of rank {} lies in no piece of its shard", local, plan.rank);
      ++owners[static_cast<std::size_t>(row)];
    }
  }
  for (std::size_t row = 0; row < owners.size(); ++row) {
    ANNULUS_ASSERT(owners[row] == 1, "global row {} is owned {} times", row, owners[row]);
  }
}

/// The rows and keys that a work item uses must be those it says, in the block or shard it says.
void check_stored_rows(const RingPlan& plan, const WorkItem& item) {
  for (std::int64_t row = 0; row < item.q_global.count; ++row) {
    ANNULUS_ASSERT(global_row(plan.shard, item.q_local[row]) == item.q_global[row], "local query row {} is not global row {}",
                   item.q_local[row], item.q_global[row]);
  }
  const KvBlock* block = item.keys.block < 0 ? nullptr : &plan.blocks.at(static_cast<std::size_t>(item.keys.block));
  for (std::int64_t row = 0; row < item.k_global.count; ++row) {
    const std::int64_t stored = item.k_stored[row];
    const std::int64_t found = block == nullptr ? global_row(plan.shard, stored) : block->rows_global[stored];
    ANNULUS_ASSERT(found == item.k_global[row], "stored key row {} is not global row {}", stored, item.k_global[row]);
  }
}

const Step& step_or_empty(const RingPlan& plan, std::int64_t number) {
  static const Step empty;
  return number < static_cast<std::int64_t>(plan.steps.size()) ? plan.steps[static_cast<std::size_t>(number)] : empty;
}

/// Message of `step` from or to `peer`, or null.
const Message* find_message(const std::vector<Message>& messages, std::int64_t peer) {
  const auto found = std::find_if(messages.begin(), messages.end(), [&](const Message& message) { return message.peer == peer; });
  return found == messages.end() ? nullptr : &*found;
}

void check_messages_fit(std::span<const RingPlan> plans, std::int64_t number) {
  for (const RingPlan& plan : plans) {
    const Step& step = step_or_empty(plan, number);
    for (const Message& sent : step.sends) {
      const RingPlan& peer = plans[static_cast<std::size_t>(sent.peer)];
      const Message* received = find_message(step_or_empty(peer, number).receives, plan.rank);
      ANNULUS_ASSERT(received != nullptr && received->bytes == sent.bytes && received->blocks.size() == sent.blocks.size(),
                     "step {}: rank {} sends to {} what it does not expect", number, plan.rank, sent.peer);
      for (std::size_t i = 0; i < sent.blocks.size(); ++i) {
        ANNULUS_ASSERT(key_of(plan.blocks[static_cast<std::size_t>(sent.blocks[i])]) ==
                           key_of(peer.blocks[static_cast<std::size_t>(received->blocks[i])]),
                       "step {}: message {} -> {} differs in block {}", number, plan.rank, sent.peer, i);
      }
    }
    for (const Message& received : step.receives) {
      ANNULUS_ASSERT(find_message(step_or_empty(plans[static_cast<std::size_t>(received.peer)], number).sends, plan.rank) != nullptr,
                     "step {}: rank {} waits for rank {} in vain", number, plan.rank, received.peer);
    }
  }
}

void check_blocks_used(const RingPlan& plan) {
  if (plan.schedule == Schedule::ring_full) { return; }
  std::vector<bool> used(plan.blocks.size(), false);
  for (const Step& step : plan.steps) {
    for (const WorkItem& item : step.work) {
      if (item.keys.block >= 0) { used[static_cast<std::size_t>(item.keys.block)] = true; }
    }
  }
  for (const Step& step : plan.steps) {
    for (const Message& message : step.receives) {
      for (const std::int64_t index : message.blocks) {
        ANNULUS_ASSERT(used[static_cast<std::size_t>(index)], "rank {} receives block {} and does not use it", plan.rank, index);
      }
    }
  }
}

}  // namespace

Coverage prove_coverage(std::span<const RingPlan> plans) {
  Coverage coverage;
  ANNULUS_EXPECTS(!plans.empty(), "no plans to prove");
  for (const RingPlan& plan : plans) { coverage.steps = std::max(coverage.steps, static_cast<std::int64_t>(plan.steps.size())); }
  PairCounter pairs(plans.front().problem, plans.front().pattern);
  check_shards(plans);
  std::vector<RankMemory> memories;
  for (const RingPlan& plan : plans) {
    memories.emplace_back(plan);
    check_blocks_used(plan);
  }
  for (std::int64_t number = 0; number < coverage.steps; ++number) {
    check_messages_fit(plans, number);
    for (std::size_t rank = 0; rank < plans.size(); ++rank) {
      const Step& current = step_or_empty(plans[rank], number);
      memories[rank].arrive(current);
      memories[rank].post(number + 1, step_or_empty(plans[rank], number + 1), current);
      for (const WorkItem& item : current.work) {
        if (item.keys.block >= 0) { memories[rank].expect_content(item.keys.block, item.keys.buffer, item.keys.offset_bytes, number); }
        check_stored_rows(plans[rank], item);
        pairs.attend(item);
      }
      for (const Message& message : current.sends) { coverage.bytes_moved += message.bytes; }
    }
  }
  for (const RankMemory& memory : memories) { memory.check_sizes(); }
  coverage.pairs = pairs.check();
  return coverage;
}

}  // namespace annulus
