// SPDX-License-Identifier: Apache-2.0
// The figures of all ranks' plans, without the plans. A rank's messages are those of the segments that its shard shares with others; most
// steps move what the step before them moved, from and to the same places, and are only counted.
#include <annulus/core/error.hpp>
#include <annulus/plan/cost.hpp>

#include "hop_figures.hpp"
#include "layout.hpp"
#include "pairs.hpp"
#include "setting.hpp"
#include "work.hpp"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

namespace annulus {

namespace {

using planning::Setting;

/// Ranks among which the blocks of one segment and head class pass, in the order of the sequence, and the bytes of each one's block.
struct Ring {
  std::vector<std::int64_t> ranks;
  std::vector<std::int64_t> bytes;  ///< 0: no block
  bool causal = false;              ///< blocks go to later ranks only
};

/// What one rank has to do with a ring.
class Stream {
 public:
  Stream(std::shared_ptr<const Ring> ring, std::int64_t place, bool own_is_resident)
      : ring_(std::move(ring)), size_(std::ssize(ring_->ranks)), place_(place), own_is_resident_(own_is_resident) {}

  std::int64_t left() const { return rank_at(place_ + size_ - 1); }
  std::int64_t right() const { return rank_at(place_ + 1); }
  /// Steps in which blocks may come, 1 to this, and in which they may go.
  std::int64_t receiving() const { return ring_->causal ? place_ : size_ - 1; }
  std::int64_t sending() const { return ring_->causal ? (place_ + 1 < size_ ? place_ + 1 : 0) : size_ - 1; }
  /// Bytes of the block that comes in a step, 0 if none does; and of the one that goes, which is the one that came a step before.
  std::int64_t received(std::int64_t step) const { return step >= 1 && step <= receiving() ? bytes_at(place_ + size_ - step) : 0; }
  std::int64_t sent(std::int64_t step) const { return step >= 1 && step <= sending() ? bytes_at(place_ + size_ - step + 1) : 0; }
  /// Whether the own block is the resident K and V as they lie in memory.
  bool own_is_resident() const { return own_is_resident_; }

 private:
  std::int64_t rank_at(std::int64_t place) const { return ring_->ranks[static_cast<std::size_t>(place % size_)]; }
  std::int64_t bytes_at(std::int64_t place) const { return ring_->bytes[static_cast<std::size_t>(place % size_)]; }

  std::shared_ptr<const Ring> ring_;
  std::int64_t size_;
  std::int64_t place_;
  bool own_is_resident_;
};

/// Follows a rank's messages step by step, as lay_out() does for a plan.
class Messages {
 public:
  Messages(const std::vector<Stream>& streams, std::int64_t rank, PlanFigures& figures)
      : streams_(streams), rank_(rank), figures_(figures) {
    places_.resize(streams.size());
    for (std::size_t i = 0; i < streams.size(); ++i) {
      by_left_.push_back(i);
      by_right_.push_back(i);
    }
    std::stable_sort(by_left_.begin(), by_left_.end(), [&](auto a, auto b) { return streams[a].left() < streams[b].left(); });
    std::stable_sort(by_right_.begin(), by_right_.end(), [&](auto a, auto b) { return streams[a].right() < streams[b].right(); });
  }

  void follow() {
    std::int64_t steps = 0;
    for (const Stream& stream : streams_) { steps = std::max({steps, stream.receiving(), stream.sending()}); }
    bool received_alike_before = false;
    std::int64_t last = 0;  // with a message
    for (std::int64_t step = 1; step <= steps; ++step) {
      const bool received_alike = step > 1 && alike(step, &Stream::received);
      const bool sent_alike = step > 2 && received_alike_before && alike(step, &Stream::sent);
      received_alike_before = received_alike;
      // What goes lies where the last step's receives put it.
      if (!sent_alike) { send(step); }
      if (!received_alike) { receive(step); }
      count(step);
      if (!received_.empty() || !sent_.empty()) { last = step; }
    }
    figures_.cost.steps = last + 1;
    for (auto& [peer, link] : links_) {
      link.peer = peer;
      figures_.cost.links.push_back(link);
    }
  }

 private:
  struct Moved {
    std::int64_t peer = 0;
    std::int64_t bytes = 0;
  };

  bool alike(std::int64_t step, std::int64_t (Stream::*bytes)(std::int64_t) const) const {
    return std::all_of(streams_.begin(), streams_.end(),
                       [&](const Stream& stream) { return (stream.*bytes)(step) == (stream.*bytes)(step - 1); });
  }

  void receive(std::int64_t step) {
    received_.clear();
    std::int64_t begin = 0;
    for (const std::size_t index : by_left_) {
      const std::int64_t bytes = streams_[index].received(step);
      if (bytes == 0) { continue; }
      const std::int64_t peer = streams_[index].left();
      if (received_.empty() || received_.back().peer != peer) {
        if (!received_.empty()) { begin = planning::aligned(begin + received_.back().bytes); }
        received_.push_back({peer, 0});
      }
      Moved& message = received_.back();
      places_[index] = begin + message.bytes;
      message.bytes += bytes;
      planning::require_message(message.bytes, begin, rank_, peer);
    }
    slot_ = received_.empty() ? 0 : begin + received_.back().bytes;
  }

  void send(std::int64_t step) {
    sent_.clear();
    packed_ = 0;
    for (std::size_t i = 0; i < by_right_.size();) {
      const std::int64_t peer = streams_[by_right_[i]].right();
      Moved message{peer, 0};
      std::int64_t blocks = 0;
      std::int64_t expected = 0;
      bool in_place = true;
      for (; i < by_right_.size() && streams_[by_right_[i]].right() == peer; ++i) {
        const Stream& stream = streams_[by_right_[i]];
        const std::int64_t bytes = stream.sent(step);
        if (bytes == 0) { continue; }
        const std::int64_t place = step == 1 ? 0 : places_[by_right_[i]];
        in_place = in_place && (step > 1 || stream.own_is_resident()) && (blocks == 0 || place == expected);
        expected = place + bytes;
        message.bytes += bytes;
        ++blocks;
        planning::require_message(message.bytes, 0, rank_, peer);
      }
      if (blocks == 0) { continue; }
      sent_.push_back(message);
      if (in_place) { continue; }
      const std::int64_t begin = planning::aligned(packed_);
      planning::require_message(message.bytes, begin, rank_, peer);
      packed_ = begin + message.bytes;
    }
  }

  void count(std::int64_t step) {
    const auto parity = static_cast<std::size_t>(step % 2);
    figures_.sizes.slot_bytes[parity] = std::max(figures_.sizes.slot_bytes[parity], slot_);
    figures_.sizes.send_bytes[parity] = std::max(figures_.sizes.send_bytes[parity], packed_);
    for (const Moved& message : received_) {
      figures_.cost.bytes_received += message.bytes;
      link(message.peer).received += message.bytes;
    }
    for (const Moved& message : sent_) {
      figures_.cost.bytes_sent += message.bytes;
      link(message.peer).sent += message.bytes;
      ++figures_.cost.messages_sent;
    }
  }

  LinkBytes& link(std::int64_t peer) {
    if (last_link_ == nullptr || last_peer_ != peer) {
      last_link_ = &links_[peer];
      last_peer_ = peer;
    }
    return *last_link_;
  }

  const std::vector<Stream>& streams_;
  std::int64_t rank_;
  PlanFigures& figures_;
  std::vector<std::size_t> by_left_;  ///< streams in the order in which their blocks lie in a slot
  std::vector<std::size_t> by_right_;
  std::vector<std::int64_t> places_;  ///< of the block that came last, by stream
  std::vector<Moved> received_;       ///< in the present step
  std::vector<Moved> sent_;
  std::int64_t slot_ = 0;
  std::int64_t packed_ = 0;
  std::map<std::int64_t, LinkBytes> links_;
  LinkBytes* last_link_ = nullptr;
  std::int64_t last_peer_ = 0;
};

std::int64_t query_heads(const HeadClass& heads) {
  std::int64_t count = 0;
  for (const HeadSet& set : heads.head_sets) { count += set.kv.count * set.q_per_kv; }
  return count;
}

/// Rows that a rank of a contiguous partition owns.
Progression rows_of_rank(const Partition& partition, std::int64_t rank) {
  return split_by_rank(partition.seq_len(), partition.ranks(), rank);
}

class Rings {
 public:
  /// The ring of a segment, made once for all its ranks.
  std::shared_ptr<const Ring> of_segment(const Setting& setting, std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
    std::shared_ptr<const Ring>& known = rings_[{branch, head_class, segment}];
    if (known) { return known; }
    auto ring = std::make_shared<Ring>();
    ring->causal = setting.problem.causal;
    const Progression tokens = segment_range(setting.problem.seq_len, setting.branch(branch), segment);
    const Rows<Global> rows = setting.rows_of(branch, head_class, segment);
    for (const std::int64_t rank : setting.partition.ranks_touching(tokens.first, tokens.last() + 1)) {
      const Rows<Global> owned = intersect(rows, rows_of_rank(setting.partition, rank));
      if (owned.empty()) { continue; }
      ring->ranks.push_back(rank);
      ring->bytes.push_back(block_bytes(setting.problem, owned.count(), setting.heads(branch, head_class).kv.count));
    }
    return known = std::move(ring);
  }

  /// The ring of all ranks' undilated rows.
  std::shared_ptr<const Ring> of_all(const Setting& setting) {
    if (all_) { return all_; }
    auto ring = std::make_shared<Ring>();
    for (std::int64_t rank = 0; rank < setting.partition.ranks(); ++rank) {
      ring->ranks.push_back(rank);
      ring->bytes.push_back(block_bytes(setting.problem, rows_of_rank(setting.partition, rank).count, setting.problem.kv_heads));
    }
    return all_ = std::move(ring);
  }

 private:
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, std::shared_ptr<const Ring>> rings_;
  std::shared_ptr<const Ring> all_;
};

/// Visible pairs of a rank's queries in one segment, for one head, with keys of tokens before `kv_length`.
Int128 pairs_in_segment(const Setting& setting, std::int64_t branch, std::int64_t head_class, std::int64_t segment,
                        std::int64_t kv_length) {
  const Rows<Global> rows = setting.rows_of(branch, head_class, segment);
  const Rows<Global> keys = intersect(rows, range(0, kv_length));
  Int128 pairs = 0;
  for (const ShardPiece& piece : setting.shard.pieces) {
    const Rows<Global> queries = intersect(rows, piece.global);
    if (!setting.problem.causal) {
      pairs += static_cast<Int128>(queries.count()) * keys.count();
      continue;
    }
    for (std::int64_t q = 0; q < queries.runs(); ++q) {
      for (std::int64_t k = 0; k < keys.runs(); ++k) { pairs += planning::causal_pairs(queries.run(q), keys.run(k)); }
    }
  }
  return pairs;
}

/// The same of all segments and heads.
Int128 pairs_of_entry(const Setting& setting, std::int64_t kv_length) {
  Int128 pairs = 0;
  setting.for_each_class([&](std::int64_t branch, std::int64_t head_class) {
    Int128 of_class = 0;
    const std::int64_t period = offset_period(setting.pattern, branch);
    for (const ShardPiece& piece : setting.shard.pieces) {
      const Progression whole = planning::whole_segments(setting, branch, piece);
      for (std::int64_t lead = 0; lead < std::min(period, whole.count); ++lead) {
        // Those whose keys are all seen, and the one, if it is among them, that has the last key that is.
        const Progression alike{whole.first + lead, period, (whole.count - 1 - lead) / period + 1};
        const std::int64_t cut = kv_length / setting.branch(branch).segment_length;
        const std::int64_t seen = std::clamp<std::int64_t>(ceil_div(cut - alike.first, period), 0, alike.count);
        of_class += seen * pairs_in_segment(setting, branch, head_class, alike.first, setting.problem.seq_len);
        if (alike.contains(cut)) { of_class += pairs_in_segment(setting, branch, head_class, cut, kv_length); }
      }
    }
    for (const std::int64_t segment : planning::cut_segments(setting, branch)) {
      of_class += pairs_in_segment(setting, branch, head_class, segment, kv_length);
    }
    pairs += of_class * query_heads(setting.heads(branch, head_class));
  });
  return pairs;
}

Int128 pairs_of(const Setting& setting) {
  std::map<std::int64_t, std::int64_t> entries;  // by the length of their keys
  for (const std::int64_t length : setting.problem.kv_lengths) { ++entries[length]; }
  if (entries.empty()) { entries[setting.problem.seq_len] = setting.problem.batch; }
  Int128 pairs = 0;
  for (const auto& [length, count] : entries) { pairs += count * pairs_of_entry(setting, length); }
  const Problem& problem = setting.problem;
  return pairs + static_cast<Int128>(problem.batch * problem.heads * setting.shard.rows()) * problem.extra_keys;
}

/// The extra keys pass from their owner to each other rank in step 1, as from the first to the second of two ranks.
void add_extra_streams(std::vector<Stream>& streams, const Setting& setting) {
  const auto ring_with = [&](std::int64_t rank) {
    Ring ring{{planning::kExtraOwner, rank}, {block_bytes(setting.problem, setting.problem.extra_keys, setting.problem.kv_heads), 0}, true};
    return std::make_shared<const Ring>(std::move(ring));
  };
  if (planning::takes_extra_keys(setting)) { streams.emplace_back(ring_with(setting.rank), 1, false); }
  // They lie in memory as they are sent, but not next to anything else that is.
  planning::for_each_taker(setting, [&](std::int64_t rank) { streams.emplace_back(ring_with(rank), 0, true); });
}

std::vector<Stream> streams_of(const Setting& setting, Rings& rings) {
  std::vector<Stream> streams;
  const auto add = [&](const std::shared_ptr<const Ring>& ring, bool own_is_resident) {
    const auto place = std::lower_bound(ring->ranks.begin(), ring->ranks.end(), setting.rank);
    if (ring->ranks.size() < 2 || place == ring->ranks.end() || *place != setting.rank) { return; }
    streams.emplace_back(ring, place - ring->ranks.begin(), own_is_resident);
  };
  if (setting.routing.schedule == Schedule::ring_full) {
    add(rings.of_all(setting), true);
    add_extra_streams(streams, setting);
    return streams;
  }
  setting.for_each_class([&](std::int64_t branch, std::int64_t head_class) {
    for (const std::int64_t segment : planning::cut_segments(setting, branch)) {
      const Rows<Global> owned = intersect(setting.rows_of(branch, head_class, segment), rows_of_rank(setting.partition, setting.rank));
      const bool image = owned.runs() == 1 && owned.count() == setting.shard.rows() &&
                         setting.heads(branch, head_class).kv.count == setting.problem.kv_heads;
      add(rings.of_segment(setting, branch, head_class, segment), image);
    }
  });
  add_extra_streams(streams, setting);
  return streams;
}

/// How figures are come by.
enum class Way { rings, hops, plans };

Way way_of(PartitionKind partition, const Routing& routing) {
  if (routing.gradients) { return Way::plans; }
  switch (routing.schedule) {
    case Schedule::direct:
    case Schedule::allgather:
      return Way::hops;
    case Schedule::ring:
    case Schedule::ring_full:
    case Schedule::automatic:
      break;
  }
  switch (partition) {
    case PartitionKind::contiguous:
      return Way::rings;
    case PartitionKind::zigzag:
    case PartitionKind::striped:
      return routing.schedule == Schedule::ring ? Way::hops : Way::plans;
    case PartitionKind::automatic:
      break;
  }
  return Way::plans;
}

}  // namespace

std::vector<Int128> pairs_of_ranks(const Problem& problem, const Pattern& pattern, const Partition& partition) {
  const Routing routing;
  Setting setting = planning::make_setting(problem, pattern, partition, routing, 0);
  std::vector<Int128> pairs;
  for (std::int64_t rank = 0; rank < partition.ranks(); ++rank) {
    setting.rank = rank;
    setting.shard = partition.shard(rank);
    pairs.push_back(pairs_of(setting));
  }
  return pairs;
}

void for_figures_of_some(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing,
                         std::span<const std::int64_t> ranks, const std::function<void(const PlanFigures&)>& visit) {
  Setting setting = planning::make_setting(problem, pattern, partition, routing, 0);
  const Way way = way_of(partition.kind(), routing);
  Rings rings;
  planning::HopFigures hops;
  for (const std::int64_t rank : ranks) {
    if (way == Way::plans) {
      const RingPlan plan = make_plan(problem, pattern, partition, routing, rank);
      visit({sizes_of(plan), plan_cost(plan)});
      continue;
    }
    setting.rank = rank;
    setting.shard = partition.shard(rank);
    PlanFigures figures;
    figures.sizes.rank = rank;
    figures.sizes.local_rows = setting.shard.rows();
    figures.sizes.partials = planning::partials_of(setting);
    figures.cost.pairs = pairs_of(setting);
    figures.cost.flops = 4.0 * static_cast<double>(problem.head_dim) * static_cast<double>(figures.cost.pairs);
    if (way == Way::rings) {
      Messages(streams_of(setting, rings), rank, figures).follow();
    } else {
      hops.add(setting, figures);
    }
    visit(figures);
  }
}

void for_figures_of_ranks(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing,
                          const std::function<void(const PlanFigures&)>& visit) {
  std::vector<std::int64_t> ranks(static_cast<std::size_t>(partition.ranks()));
  std::iota(ranks.begin(), ranks.end(), std::int64_t{0});
  for_figures_of_some(problem, pattern, partition, routing, ranks, visit);
}

}  // namespace annulus
