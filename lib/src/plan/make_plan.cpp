// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/plan/plan.hpp>

#include <algorithm>
#include <optional>

namespace annulus {

namespace {

/// Messages start at multiples of this inside a slot or send buffer, so that vector loads of a block's rows stay aligned.
constexpr std::int64_t kMessageAlignment = 256;
/// Of one step and one direction, so that no sum of places and sizes can pass 2^63.
constexpr std::int64_t kMostMessageBytes = std::int64_t{1} << 60;

/// Rows of one piece of a rank's shard that lie in a segment's row set.
struct OwnedRows {
  std::int64_t piece = 0;
  Progression rows;
};

/// A rank that owns rows of a segment's row set.
struct Member {
  std::int64_t rank = 0;
  std::vector<OwnedRows> owned;
  std::int64_t last_row = -1;  ///< largest owned row: the query that sees most under `causal`
};

/// One hop of a block to or from this rank.
struct Hop {
  std::int64_t block = 0;
  std::int64_t step = 0;
  std::int64_t peer = 0;
};

class Planner {
 public:
  Planner(const Problem& problem, const Pattern& pattern, const Partition& partition, Schedule schedule, std::int64_t rank)
      : partition_(partition) {
    validate(problem);
    validate(pattern);
    ANNULUS_EXPECTS(partition.seq_len() == problem.seq_len, "the partition is of {} tokens, the problem of {}", partition.seq_len(),
                    problem.seq_len);
    plan_.problem = problem;
    plan_.pattern = pattern;
    plan_.rank = rank;
    plan_.ranks = partition.ranks();
    plan_.schedule = schedule;
    plan_.shard = partition.shard(rank);
    plan_.local_rows = plan_.shard.rows();
    for (std::int64_t branch = 0; branch < static_cast<std::int64_t>(pattern.branches.size()); ++branch) {
      classes_.push_back(head_classes(problem, pattern, branch));
    }
    plan_.steps.resize(1);
  }

  RingPlan make() {
    attend_resident();
    if (plan_.schedule == Schedule::ring_full) {
      pass_whole_shards();
    } else {
      pass_needed_blocks();
    }
    lay_out_messages();
    attend_received();
    return std::move(plan_);
  }

 private:
  const Branch& branch_shape(std::int64_t branch) const { return plan_.pattern.branches[static_cast<std::size_t>(branch)]; }

  Step& step(std::int64_t number) {
    if (static_cast<std::int64_t>(plan_.steps.size()) <= number) { plan_.steps.resize(static_cast<std::size_t>(number) + 1); }
    return plan_.steps[static_cast<std::size_t>(number)];
  }

  Progression rows_of(std::int64_t branch, const HeadClass& heads, std::int64_t segment) const {
    return segment_rows(plan_.problem.seq_len, plan_.pattern, branch, segment, heads);
  }

  static Progression local_rows(const ShardPiece& piece, const Progression& rows) {
    Progression local = indices_of(rows, piece.global);
    local.first += piece.local_first;
    return local;
  }

  /// Adds the attention of `q_rows` (global, of one piece) to `k_rows`, unless the mask hides all of it.
  void add_work(std::int64_t number, WorkItem item, const HeadClass& heads, const ShardPiece& piece, const Progression& q_rows,
                const Progression& k_rows) {
    if (q_rows.empty() || k_rows.empty()) { return; }
    const bool causal = plan_.problem.causal;
    if (causal && k_rows.first > q_rows.last()) { return; }
    item.mask = causal && k_rows.last() > q_rows.first ? kernels::Mask::causal : kernels::Mask::none;
    item.q_global = q_rows;
    item.q_local = local_rows(piece, q_rows);
    item.k_global = k_rows;
    for (const HeadSet& set : heads.head_sets) {
      item.heads = set;
      step(number).work.push_back(item);
    }
  }

  /// Keys of the rank's own rows: whole segments of a piece as one item for all that look alike, the others one by one.
  void attend_resident() {
    for (std::int64_t branch = 0; branch < static_cast<std::int64_t>(classes_.size()); ++branch) {
      for (std::size_t index = 0; index < classes_[static_cast<std::size_t>(branch)].size(); ++index) {
        const HeadClass& heads = classes_[static_cast<std::size_t>(branch)][index];
        WorkItem item;
        item.branch = branch;
        item.head_class = static_cast<std::int64_t>(index);
        for (const ShardPiece& piece : plan_.shard.pieces) { attend_whole_segments(item, heads, piece); }
        for (const std::int64_t segment : cut_segments(branch)) { attend_cut_segment(item, heads, segment); }
      }
    }
  }

  /// Full-length segments [begin, end) that lie inside one piece.
  Progression whole_segments(std::int64_t branch, const ShardPiece& piece) const {
    if (piece.global.stride != 1) { return {}; }
    const std::int64_t w = branch_shape(branch).segment_length;
    return range(ceil_div(piece.global.first, w), floor_div(piece.global.last() + 1, w));
  }

  void attend_whole_segments(WorkItem item, const HeadClass& heads, const ShardPiece& piece) {
    const Progression segments = whole_segments(item.branch, piece);
    const std::int64_t period = offset_period(plan_.pattern, item.branch);
    for (std::int64_t lead = 0; lead < std::min(period, segments.count); ++lead) {
      item.segment = segments.first + lead;
      item.segments = (segments.count - 1 - lead) / period + 1;
      item.segment_stride = period * branch_shape(item.branch).segment_length;
      const Progression rows = rows_of(item.branch, heads, item.segment);
      if (rows.empty()) { continue; }
      item.k_stored = local_rows(piece, rows);
      add_work(0, item, heads, piece, rows, rows);
    }
  }

  /// Segments the shard touches that attend_whole_segments does not cover, ascending.
  std::vector<std::int64_t> cut_segments(std::int64_t branch) const {
    std::vector<std::int64_t> cut;
    const std::int64_t w = branch_shape(branch).segment_length;
    for (const ShardPiece& piece : plan_.shard.pieces) {
      const Progression whole = whole_segments(branch, piece);
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

  void attend_cut_segment(WorkItem item, const HeadClass& heads, std::int64_t segment) {
    const Progression rows = rows_of(item.branch, heads, segment);
    item.segment = segment;
    for (const ShardPiece& q_piece : plan_.shard.pieces) {
      for (const ShardPiece& k_piece : plan_.shard.pieces) {
        const Progression k_rows = intersect(rows, k_piece.global);
        if (k_rows.empty()) { continue; }
        item.k_stored = local_rows(k_piece, k_rows);
        add_work(0, item, heads, q_piece, intersect(rows, q_piece.global), k_rows);
      }
    }
  }

  std::int64_t add_block(KvBlock block) {
    block.bytes = 2 * block_elements(plan_.problem, block) * size_of(plan_.problem.dtype);
    plan_.blocks.push_back(block);
    return static_cast<std::int64_t>(plan_.blocks.size()) - 1;
  }

  /// Schedule ring: each block passes along the cyclic order of the ranks that need it.
  void pass_needed_blocks() {
    for (std::int64_t branch = 0; branch < static_cast<std::int64_t>(classes_.size()); ++branch) {
      const std::vector<std::int64_t> segments = cut_segments(branch);
      for (std::size_t index = 0; index < classes_[static_cast<std::size_t>(branch)].size(); ++index) {
        const HeadClass& heads = classes_[static_cast<std::size_t>(branch)][index];
        for (const std::int64_t segment : segments) { pass_segment(branch, static_cast<std::int64_t>(index), heads, segment); }
      }
    }
  }

  std::vector<Member> members_of(std::int64_t branch, std::int64_t segment, const Progression& rows) const {
    std::vector<Member> members;
    const Progression tokens = segment_range(plan_.problem.seq_len, branch_shape(branch), segment);
    for (const std::int64_t rank : partition_.ranks_touching(tokens.first, tokens.last() + 1)) {
      Member member;
      member.rank = rank;
      const Shard shard = partition_.shard(rank);
      for (std::size_t piece = 0; piece < shard.pieces.size(); ++piece) {
        const Progression owned = intersect(rows, shard.pieces[piece].global);
        if (owned.empty()) { continue; }
        member.owned.push_back({static_cast<std::int64_t>(piece), owned});
        member.last_row = std::max(member.last_row, owned.last());
      }
      if (!member.owned.empty()) { members.push_back(std::move(member)); }
    }
    return members;
  }

  void pass_segment(std::int64_t branch, std::int64_t head_class, const HeadClass& heads, std::int64_t segment) {
    const std::vector<Member> members = members_of(branch, segment, rows_of(branch, heads, segment));
    const auto self = std::find_if(members.begin(), members.end(), [&](const Member& member) { return member.rank == plan_.rank; });
    if (self == members.end()) { return; }
    const auto size = static_cast<std::int64_t>(members.size());
    const std::int64_t self_index = self - members.begin();
    for (std::int64_t owner = 0; owner < size; ++owner) {
      for (const OwnedRows& owned : members[static_cast<std::size_t>(owner)].owned) {
        const auto needs = [&](std::int64_t index) {
          return index != owner && (!plan_.problem.causal || members[static_cast<std::size_t>(index)].last_row >= owned.rows.first);
        };
        if (self_index != owner && !needs(self_index)) { continue; }
        // Walk the cyclic order from the owner: who hands the block to this rank, in which step, and who gets it next.
        std::int64_t arrival = 0;
        std::int64_t previous = members[static_cast<std::size_t>(owner)].rank;
        std::optional<std::int64_t> next;
        bool passed_self = self_index == owner;
        for (std::int64_t distance = 1; distance < size && !next; ++distance) {
          const std::int64_t index = (owner + distance) % size;
          if (!needs(index)) { continue; }
          if (passed_self) {
            next = members[static_cast<std::size_t>(index)].rank;
          } else {
            ++arrival;
            passed_self = index == self_index;
            if (!passed_self) { previous = members[static_cast<std::size_t>(index)].rank; }
          }
        }
        if (self_index == owner && !next) { continue; }
        const std::int64_t block =
            add_block({branch, head_class, segment, members[static_cast<std::size_t>(owner)].rank, owned.rows, heads.kv, 0});
        if (self_index != owner) { receives_.push_back({block, arrival, previous}); }
        if (next) { sends_.push_back({block, arrival + 1, *next}); }
      }
    }
  }

  /// Schedule ring-full: the undilated rows of every rank make ranks-1 hops.
  void pass_whole_shards() {
    const std::int64_t ranks = plan_.ranks;
    const std::int64_t left = (plan_.rank + ranks - 1) % ranks;
    const std::int64_t right = (plan_.rank + 1) % ranks;
    for (std::int64_t distance = 0; distance < ranks && ranks > 1; ++distance) {
      const std::int64_t owner = (plan_.rank + ranks - distance) % ranks;
      for (const ShardPiece& piece : partition_.shard(owner).pieces) {
        const std::int64_t block = add_block({-1, -1, -1, owner, piece.global, range(0, plan_.problem.kv_heads), 0});
        if (distance > 0) { receives_.push_back({block, distance, left}); }
        if (distance + 1 < ranks) { sends_.push_back({block, distance + 1, right}); }
      }
    }
  }

  /// Whether the block is the resident K and V as they lie in memory.
  bool is_resident_image(const KvBlock& block) const {
    return block.owner == plan_.rank && block.rows_global.count == plan_.local_rows && block.kv_heads.count == plan_.problem.kv_heads;
  }

  /// Orders each step's hops into messages: receives one after another in the step's slot; sends straight from where their blocks lie if
  /// those are neighbours in one buffer, else packed into the step's send buffer.
  void lay_out_messages() {
    const auto by_step_and_peer = [](std::vector<Hop>& hops) {
      std::stable_sort(hops.begin(), hops.end(), [](const Hop& a, const Hop& b) {
        return a.step != b.step ? a.step < b.step : (a.peer != b.peer ? a.peer < b.peer : a.block < b.block);
      });
    };
    by_step_and_peer(receives_);
    by_step_and_peer(sends_);

    place_.assign(plan_.blocks.size(), {});
    for (std::size_t index = 0; index < plan_.blocks.size(); ++index) { place_[index].block = static_cast<std::int64_t>(index); }
    for (auto hop = receives_.begin(); hop != receives_.end();) {
      Message message;
      message.peer = hop->peer;
      message.buffer = hop->step % 2 == 0 ? BufferId::slot_0 : BufferId::slot_1;
      Step& current = step(hop->step);
      message.offset_bytes = current.receives.empty() ? 0 : aligned_end(current.receives.back());
      const std::int64_t number = hop->step;
      for (; hop != receives_.end() && hop->step == number && hop->peer == message.peer; ++hop) {
        place_[static_cast<std::size_t>(hop->block)] = {hop->block, message.buffer, message.offset_bytes + message.bytes};
        append(message, hop->block);
      }
      std::int64_t& slot = plan_.slot_bytes[number % 2];
      slot = std::max(slot, message.offset_bytes + message.bytes);
      current.receives.push_back(std::move(message));
    }
    for (auto hop = sends_.begin(); hop != sends_.end();) {
      Message message;
      message.peer = hop->peer;
      const std::int64_t number = hop->step;
      for (; hop != sends_.end() && hop->step == number && hop->peer == message.peer; ++hop) { append(message, hop->block); }
      if (!send_in_place(message)) { send_packed(message, number); }
      step(number).sends.push_back(std::move(message));
    }
  }

  static std::int64_t aligned_end(const Message& message) {
    return ceil_div(message.offset_bytes + message.bytes, kMessageAlignment) * kMessageAlignment;
  }

  void append(Message& message, std::int64_t block) const {
    message.blocks.push_back(block);
    message.bytes += plan_.blocks[static_cast<std::size_t>(block)].bytes;
    ANNULUS_EXPECTS(message.bytes <= kMostMessageBytes - message.offset_bytes,
                    "rank {} would exchange more than 2^60 bytes with rank {} in one step", plan_.rank, message.peer);
  }

  bool send_in_place(Message& message) const {
    const auto place_of = [&](std::int64_t block) -> std::optional<BlockPlace> {
      const KvBlock& what = plan_.blocks[static_cast<std::size_t>(block)];
      if (what.owner != plan_.rank) { return place_[static_cast<std::size_t>(block)]; }
      if (is_resident_image(what)) { return BlockPlace{block, BufferId::resident, 0}; }
      return std::nullopt;
    };
    const std::optional<BlockPlace> first = place_of(message.blocks.front());
    if (!first) { return false; }
    std::int64_t expected = first->offset_bytes;
    for (const std::int64_t block : message.blocks) {
      const std::optional<BlockPlace> place = place_of(block);
      if (!place || place->buffer != first->buffer || place->offset_bytes != expected) { return false; }
      expected += plan_.blocks[static_cast<std::size_t>(block)].bytes;
    }
    message.buffer = first->buffer;
    message.offset_bytes = first->offset_bytes;
    return true;
  }

  void send_packed(Message& message, std::int64_t number) {
    Step& current = step(number);
    message.buffer = number % 2 == 0 ? BufferId::send_0 : BufferId::send_1;
    std::int64_t& size = plan_.send_bytes[number % 2];
    message.offset_bytes = 0;
    for (const Message& earlier : current.sends) {
      if (earlier.buffer == message.buffer) { message.offset_bytes = std::max(message.offset_bytes, aligned_end(earlier)); }
    }
    ANNULUS_EXPECTS(message.bytes <= kMostMessageBytes - message.offset_bytes, "rank {} would send more than 2^60 bytes in one step",
                    plan_.rank);
    std::int64_t offset = message.offset_bytes;
    for (const std::int64_t block : message.blocks) {
      const KvBlock& what = plan_.blocks[static_cast<std::size_t>(block)];
      const bool own = what.owner == plan_.rank;
      const BlockPlace& place = place_[static_cast<std::size_t>(block)];
      current.packs.push_back({block, own ? BufferId::resident : place.buffer, own ? 0 : place.offset_bytes, message.buffer, offset});
      offset += what.bytes;
    }
    size = std::max(size, offset);
  }

  void attend_received() {
    for (const Hop& hop : receives_) {
      const KvBlock& block = plan_.blocks[static_cast<std::size_t>(hop.block)];
      WorkItem item;
      const BlockPlace& place = place_[static_cast<std::size_t>(hop.block)];
      item.keys = {hop.block, place.buffer, place.offset_bytes};
      if (block.branch >= 0) {
        item.branch = block.branch;
        item.head_class = block.head_class;
        const HeadClass& heads = classes_[static_cast<std::size_t>(block.branch)][static_cast<std::size_t>(block.head_class)];
        attend_block(hop.step, item, heads, block.segment, block.rows_global, block.rows_global);
        continue;
      }
      for (std::int64_t branch = 0; branch < static_cast<std::int64_t>(classes_.size()); ++branch) {
        for (std::size_t index = 0; index < classes_[static_cast<std::size_t>(branch)].size(); ++index) {
          item.branch = branch;
          item.head_class = static_cast<std::int64_t>(index);
          const HeadClass& heads = classes_[static_cast<std::size_t>(branch)][index];
          for (const std::int64_t segment : cut_segments(branch)) {
            attend_block(hop.step, item, heads, segment, intersect(rows_of(branch, heads, segment), block.rows_global), block.rows_global);
          }
        }
      }
    }
  }

  /// Attention of the shard's queries in `segment` to `k_rows`, stored in a block that holds `stored_rows`.
  void attend_block(std::int64_t number, WorkItem item, const HeadClass& heads, std::int64_t segment, const Progression& k_rows,
                    const Progression& stored_rows) {
    if (k_rows.empty()) { return; }
    item.segment = segment;
    item.k_stored = indices_of(k_rows, stored_rows);
    const Progression rows = rows_of(item.branch, heads, segment);
    for (const ShardPiece& piece : plan_.shard.pieces) { add_work(number, item, heads, piece, intersect(rows, piece.global), k_rows); }
  }

  const Partition& partition_;
  RingPlan plan_;
  std::vector<std::vector<HeadClass>> classes_;  ///< by branch
  std::vector<Hop> receives_;
  std::vector<Hop> sends_;
  std::vector<BlockPlace> place_;  ///< by block, of received ones
};

}  // namespace

std::int64_t block_elements(const Problem& problem, const KvBlock& block) {
  return problem.batch * block.rows_global.count * block.kv_heads.count * problem.head_dim;
}

std::int64_t buffer_bytes(const RingPlan& plan, BufferId buffer) {
  switch (buffer) {
    case BufferId::slot_0:
    case BufferId::slot_1:
      return plan.slot_bytes[buffer == BufferId::slot_0 ? 0 : 1];
    case BufferId::send_0:
    case BufferId::send_1:
      return plan.send_bytes[buffer == BufferId::send_0 ? 0 : 1];
    case BufferId::resident:
      break;
  }
  const Problem& problem = plan.problem;
  return 2 * problem.batch * plan.local_rows * problem.kv_heads * problem.head_dim * size_of(problem.dtype);
}

RingPlan make_plan(const Problem& problem, const Pattern& pattern, const Partition& partition, Schedule schedule, std::int64_t rank) {
  return Planner(problem, pattern, partition, schedule, rank).make();
}

}  // namespace annulus
