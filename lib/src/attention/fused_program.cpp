// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/fused_program.hpp>

#include <annulus/core/error.hpp>
#include <annulus/plan/item_parts.hpp>

#include <algorithm>
#include <map>
#include <tuple>

namespace annulus {

namespace fused = kernels::cuda::fused;

namespace {

/// Query rows and heads whose records fold into the same partials.
struct Group {
  std::int64_t appearances = 0;
  std::int64_t seen = 0;  ///< of them, while records are made
  std::int64_t partial = 0;
  std::int64_t zero_keys = 0;  ///< that its rows see besides
};
using GroupKey = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

GroupKey key_of(const WorkItem& item) {
  return {item.branch, item.head_class, item.segment, item.heads.q_first, item.q_local.only().first};
}

std::int64_t heads_of(const WorkItem& item) { return item.heads.kv.count * item.heads.q_per_kv; }
std::int64_t units_of(const WorkItem& item) { return ceil_div(item.q_local.count(), std::int64_t{fused::kGroupRows}); }

std::int32_t narrow(std::int64_t value) { return checked_narrow<std::int32_t>(value); }

class Maker {
 public:
  explicit Maker(const RingPlan& plan) : plan_(plan) {
    for (const ShardPiece& piece : plan.shard.pieces) { static_cast<void>(number_of(resident_tensor(piece))); }
    const bool one_branch = one_branch_per_head(plan.pattern);
    program_.writes_rows = one_branch && !plan.pattern.scale_by_branches && plan.problem.extra_keys == 0;
  }

  FusedProgram make() {
    for (const Step& step : plan_.steps) {
      for (const WorkItem& item : step.work) {
        Group& group = groups_[key_of(item)];
        ++group.appearances;
        group.zero_keys += item.zero_keys;
      }
    }
    place_partials();
    for (std::size_t step = 0; step < plan_.steps.size(); ++step) { add_step(static_cast<std::int64_t>(step)); }
    add_entries();
    return std::move(program_);
  }

 private:
  /// A group whose only record writes its rows needs none.
  bool keeps_partials(const Group& group) const { return !program_.writes_rows || group.appearances > 1; }

  void place_partials() {
    for (const Step& step : plan_.steps) {
      for (const WorkItem& item : step.work) {
        Group& group = groups_.at(key_of(item));
        if (std::exchange(group.seen, 1) != 0) { continue; }
        first_items_.push_back(&item);
        group.partial = program_.partials;
        if (keeps_partials(group)) { program_.partials += plan_.problem.batch * item.segments * heads_of(item) * units_of(item); }
      }
    }
    for (auto& entry : groups_) { entry.second.seen = 0; }
  }

  void add_step(std::int64_t step) {
    for (const WorkItem& item : plan_.steps[static_cast<std::size_t>(step)].work) {
      const bool new_wave = program_.launches.empty() || program_.launches.back().step != step || wave_ != item.wave;
      if (new_wave) { program_.launches.push_back({step, {}, 0}); }
      wave_ = item.wave;
      add_item(program_.launches.back(), item);
    }
  }

  void add_item(FusedProgram::Launch& launch, const WorkItem& item) {
    Group& group = groups_.at(key_of(item));
    ++group.seen;
    const Progression& q = item.q_local.only();
    const bool resident = item.keys.block < 0;
    const Progression& k = resident ? item.k_local.only() : item.k_packed.only();
    const ShardPiece* const piece = resident ? &piece_at(plan_.shard, k.first) : nullptr;
    const KeyTensor keys = resident ? resident_tensor(*piece) : block_tensor(item);
    const std::int64_t k_first = k.first - (resident ? piece->local_first : 0);
    const Progression stored_heads = resident ? range(0, plan_.problem.kv_heads) : block_of(item).kv_heads;
    const Progression k_heads = indices_of(item.heads.kv, stored_heads);

    fused::Record record;
    record.q_stride = q.stride;
    record.k_stride = k.stride;
    record.q_rows = narrow(q.count);
    record.q = 0;
    record.kv = narrow(1 + 2 * number_of(keys));
    record.q_head = narrow(item.heads.q_first);
    record.q_head_step = narrow(item.heads.kv.stride * plan_.problem.group_size());
    record.k_head = narrow(k_heads.first);
    record.k_head_step = narrow(k_heads.stride);
    record.kv_heads = narrow(item.heads.kv.count);
    record.q_per_kv = narrow(item.heads.q_per_kv);
    record.diagonal = narrow(diagonal_of(item));
    record.mask = item.mask;
    record.part = item.place.part;
    record.order = item.place.block_rows > 0 ? fused::KeyOrder::cyclic : fused::KeyOrder::arrival;
    record.first = group.seen == 1;
    record.last = program_.writes_rows && group.seen == group.appearances;
    record.zero_keys = record.last ? narrow(group.zero_keys) : 0;
    std::int64_t partial = group.partial;
    for (std::int64_t b = 0; b < plan_.problem.batch; ++b) {
      for (std::int64_t s = 0; s < item.segments; ++s) {
        record.q_batch = record.k_batch = narrow(b);
        record.q_first = q.first + s * item.segment_stride;
        record.k_first = k_first + s * item.segment_stride;
        record.k_rows = narrow(keys_left(plan_.problem, item, b, s));
        record.partial = partial;
        partial += heads_of(item) * units_of(item);
        launch.records.push_back(record);
      }
    }
    const std::int64_t tiles = ceil_div(q.count, std::int64_t{fused::tile_rows(plan_.problem.head_dim)});
    const std::int64_t added = plan_.problem.batch * item.segments * heads_of(item) * tiles;
    launch.tiles += added;
    program_.tiles += added;
    program_.most_tiles = std::max(program_.most_tiles, launch.tiles);
  }

  /// Rows from the first key to the first query, of their segment, or of it those that a rank with stripes owns.
  std::int64_t diagonal_of(const WorkItem& item) const {
    if (item.place.block_rows > 0) { return item.place.q_first - item.place.k_first; }
    if (plan_.problem.is_extra(item.k_global[0])) { return 0; }
    // Without an order of keys a causal mask alone asks for it, and that is among rows of one run, whose distance is that of the segment's
    // rows, or where ranks own stripes of those that one rank has. Then the first query may come between two keys.
    const Progression& q = item.q_global.only();
    const Progression& k = item.k_global.only();
    const std::int64_t of_segment = row_distance(plan_.problem.seq_len, plan_.pattern, item.branch, item.segment);
    return floor_div(q.first - k.first, k.count > 1 ? k.stride : q.count > 1 ? q.stride : of_segment);
  }

  const KvBlock& block_of(const WorkItem& item) const { return plan_.blocks[static_cast<std::size_t>(item.keys.block)]; }

  KeyTensor block_tensor(const WorkItem& item) const {
    const KvBlock& block = block_of(item);
    return {item.keys.buffer, item.keys.offset_bytes, block.rows_global.count(), block.kv_heads.count};
  }

  KeyTensor resident_tensor(const ShardPiece& piece) const {
    return {BufferId::resident, resident_offset(plan_.problem, piece), piece.global.count, plan_.problem.kv_heads};
  }

  /// Blocks of one shape that come to one place one after the other are one tensor.
  std::int64_t number_of(const KeyTensor& keys) {
    const auto place = std::tuple(keys.buffer, keys.offset_bytes, keys.rows, keys.heads);
    const auto [found, added] = numbers_.try_emplace(place, std::ssize(program_.keys));
    if (!added) { return found->second; }
    program_.keys.push_back(keys);
    return found->second;
  }

  void add_entries() {
    const std::int64_t heads = plan_.problem.heads;
    if (program_.writes_rows) {
      std::int64_t covered = 0;
      for (const WorkItem* item : first_items_) { covered += item->segments * heads_of(*item) * item->q_local.count(); }
      if (covered < heads * plan_.local_rows) { program_.begin.assign(static_cast<std::size_t>(heads) + 1, 0); }
      return;
    }
    std::vector<std::vector<fused::CombineEntry>> of_head(static_cast<std::size_t>(heads));
    std::stable_sort(first_items_.begin(), first_items_.end(), [](const WorkItem* a, const WorkItem* b) { return a->branch < b->branch; });
    for (const WorkItem* item : first_items_) {
      const Progression& q = item->q_local.only();
      fused::CombineEntry entry;
      entry.first = q.first;
      entry.stride = q.stride;
      entry.count = q.count;
      entry.segments = item->segments;
      entry.segment_stride = item->segment_stride;
      entry.segment_step = heads_of(*item) * units_of(*item);
      entry.batch_step = item->segments * entry.segment_step;
      entry.partial = groups_.at(key_of(*item)).partial;
      entry.zero_keys = groups_.at(key_of(*item)).zero_keys;
      entry.extra = plan_.problem.is_extra(item->k_global[0]);
      for (std::int64_t j = 0; j < item->heads.kv.count; ++j) {
        for (std::int64_t i = 0; i < item->heads.q_per_kv; ++i) {
          const std::int64_t head = item->heads.q_first + j * item->heads.kv.stride * plan_.problem.group_size() + i;
          of_head[static_cast<std::size_t>(head)].push_back(entry);
          entry.partial += units_of(*item);
        }
      }
    }
    program_.begin.push_back(0);
    for (const std::vector<fused::CombineEntry>& entries : of_head) {
      program_.entries.insert(program_.entries.end(), entries.begin(), entries.end());
      program_.begin.push_back(narrow(std::ssize(program_.entries)));
    }
  }

  const RingPlan& plan_;
  FusedProgram program_;
  std::map<GroupKey, Group> groups_;
  std::vector<const WorkItem*> first_items_;  ///< of each group
  std::map<std::tuple<BufferId, std::int64_t, std::int64_t, std::int64_t>, std::int64_t> numbers_;
  std::int64_t wave_ = 0;
};

}  // namespace

FusedProgram fused_program(const RingPlan& plan) { return Maker(plan).make(); }

std::vector<fused::Operand> fused_operands(const FusedProgram& program, const RingPlan& plan, const TensorAddresses& addresses) {
  const Problem& problem = plan.problem;
  std::vector<fused::Operand> operands{fused::contiguous(addresses.q, problem.batch, plan.local_rows, problem.heads, problem.head_dim)};
  for (const KeyTensor& keys : program.keys) {
    const std::byte* k = address_of(addresses, keys.buffer) + keys.offset_bytes;
    const std::int64_t bytes = problem.batch * keys.rows * keys.heads * problem.head_dim * size_of(problem.dtype);
    operands.push_back(fused::contiguous(k, problem.batch, keys.rows, keys.heads, problem.head_dim));
    operands.push_back(fused::contiguous(k + bytes, problem.batch, keys.rows, keys.heads, problem.head_dim));
  }
  return operands;
}

Int128 fused_bytes(const FusedProgram& program, std::int64_t head_dim) {
  const auto bytes = [](std::int64_t count, std::int64_t size) { return static_cast<Int128>(count) * size; };
  const auto size_of_number = static_cast<std::int64_t>(sizeof(std::int32_t));
  return bytes(program.partials, fused::partial_bytes(head_dim, 1)) + bytes(program.tiles, static_cast<std::int64_t>(sizeof(fused::Tile))) +
         bytes(program.most_tiles, 2 * size_of_number) +  // tiles that may have to be done again
         (program.tiles > 0 ? size_of_number : 0) +       // the ticket
         bytes(std::ssize(program.entries), static_cast<std::int64_t>(sizeof(fused::CombineEntry))) +
         bytes(std::ssize(program.begin), size_of_number);
}

}  // namespace annulus
