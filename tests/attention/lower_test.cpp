// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/lower.hpp>

#include <annulus/core/error.hpp>
#include <annulus/plan/item_parts.hpp>
#include <annulus/verify/random_problem.hpp>
#include <annulus_test.hpp>

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

using namespace annulus;

namespace {

/// A tensor that is nowhere: addresses in it are only compared, and never read.
std::byte* region(std::uintptr_t number) { return reinterpret_cast<std::byte*>(number << 40U); }

constexpr std::int64_t kAccumulator = 8;

TensorAddresses some_addresses() {
  TensorAddresses addresses;
  addresses.q = region(1);
  addresses.resident = region(2);
  addresses.out = region(3);
  addresses.lse = reinterpret_cast<float*>(region(4));
  addresses.slots = {region(5), region(6)};
  addresses.sends = {region(7), region(8)};
  return addresses;
}

std::vector<kernels::PartialPointers> partials_of(const RingPlan& plan) {
  std::vector<kernels::PartialPointers> partials;
  for (std::int64_t index = 0; index < plan.partials; ++index) {
    const auto first = static_cast<std::uintptr_t>(10 + 3 * index);
    partials.push_back({region(first), region(first + 1), region(first + 2)});
  }
  return partials;
}

std::int64_t distance(const void* from, const void* to) { return static_cast<const std::byte*>(to) - static_cast<const std::byte*>(from); }

const std::byte* slot_of(const TensorAddresses& addresses, BufferId buffer) {
  return addresses.slots[buffer == BufferId::slot_0 ? 0 : buffer == BufferId::slot_1 ? 1 : 2];
}

/// A piece of the shard, and where its K and V lie in the resident buffer.
struct Piece {
  std::int64_t first = 0;  ///< local row
  std::int64_t rows = 0;
  std::int64_t offset_bytes = 0;
};

Piece piece_of(const RingPlan& plan, std::int64_t local) {
  const Problem& problem = plan.problem;
  Piece piece;
  for (const ShardPiece& each : plan.shard.pieces) {
    piece.rows = each.global.count;
    if (local < piece.first + piece.rows) { break; }
    piece.first += piece.rows;
  }
  piece.offset_bytes = 2 * problem.batch * piece.first * problem.kv_heads * problem.head_dim * size_of(problem.dtype);
  return piece;
}

/// Checks one task against its item, element by element, from the layouts that plan.hpp names.
void check_task(const RingPlan& plan, const TensorAddresses& addresses, const kernels::PartialPointers& partial, const WorkItem& item,
                const ItemPart& part, const kernels::AttendTask& task) {
  const Problem& problem = plan.problem;
  REQUIRE((task.batch == part.entries && task.segments == part.segments && task.k_rows == part.keys));
  const std::int64_t size = size_of(problem.dtype);
  const bool resident = item.keys.block < 0;
  const Progression stored_heads = resident ? range(0, problem.kv_heads) : plan.blocks[static_cast<std::size_t>(item.keys.block)].kv_heads;
  const Piece piece = resident ? piece_of(plan, item.k_local[0]) : Piece{};
  const std::int64_t stored_rows = resident ? piece.rows : plan.blocks[static_cast<std::size_t>(item.keys.block)].rows_global.count();
  const std::byte* keys =
      resident ? addresses.resident + piece.offset_bytes : slot_of(addresses, item.keys.buffer) + item.keys.offset_bytes;
  for (std::int64_t b = part.first_entry; b < part.first_entry + part.entries; ++b) {
    for (std::int64_t s = part.first_segment; s < part.first_segment + part.segments; ++s) {
      for (std::int64_t j = 0; j < task.kv_heads; ++j) {
        const auto at = [&](const kernels::TaskStrides& strides, std::int64_t row, std::int64_t i) {
          return (b - part.first_entry) * strides.batch + (s - part.first_segment) * strides.segment + row * strides.row +
                 j * strides.kv_head + i * strides.head;
        };
        for (std::int64_t i = 0; i < task.q_per_kv; ++i) {
          const std::int64_t head = item.heads.q_first + j * item.heads.kv.stride * problem.group_size() + i;
          for (std::int64_t row = 0; row < task.q_rows; ++row) {
            const std::int64_t local = item.q_local[row] + s * item.segment_stride;
            const std::int64_t vector = ((b * plan.local_rows + local) * problem.heads + head) * problem.head_dim;
            const std::int64_t number = (b * problem.heads + head) * plan.local_rows + local;
            REQUIRE(distance(addresses.q, task.q) + at(task.q_strides, row, i) * size == vector * size);
            REQUIRE(distance(partial.acc, task.acc) + at(task.acc_strides, row, i) * kAccumulator == vector * kAccumulator);
            REQUIRE(distance(partial.max, task.max) + at(task.stat_strides, row, i) * kAccumulator == number * kAccumulator);
            REQUIRE(distance(partial.sum, task.sum) + at(task.stat_strides, row, i) * kAccumulator == number * kAccumulator);
            if (problem.dropout.probability == 0) { continue; }
            const std::int64_t position = item.q_global[row] + s * item.segment_stride;
            const kernels::DropoutRow expected(problem.dropout, b, head, position);
            REQUIRE(kernels::dropout_row(task, b - part.first_entry, s - part.first_segment, j, i, row).factor(0) == expected.factor(0));
          }
        }
        std::int64_t place_of_head = 0;
        while (stored_heads[place_of_head] != item.heads.kv[j]) { ++place_of_head; }
        for (std::int64_t row = 0; row < task.k_rows; ++row) {
          const std::int64_t stored = (resident ? item.k_local[row] - piece.first : item.k_packed[row]) + s * item.segment_stride;
          const std::int64_t vector = ((b * stored_rows + stored) * stored_heads.count + place_of_head) * problem.head_dim;
          const std::int64_t k_elements = problem.batch * stored_rows * stored_heads.count * problem.head_dim;
          REQUIRE(distance(keys, task.k) + at(task.kv_strides, row, 0) * size == vector * size);
          REQUIRE(distance(keys, task.v) + at(task.kv_strides, row, 0) * size == (k_elements + vector) * size);
          REQUIRE(kernels::dropout_key(task, s - part.first_segment, row) == item.k_global[row] + s * item.segment_stride);
        }
      }
    }
  }
}

/// The tasks of one pack move every element of its block once, from where its row and head lie.
void check_pack(const RingPlan& plan, const TensorAddresses& addresses, const PackItem& item, std::span<const kernels::PackTask> tasks) {
  const Problem& problem = plan.problem;
  const KvBlock& block = plan.blocks[static_cast<std::size_t>(item.block)];
  const std::int64_t vector_bytes = problem.head_dim * size_of(problem.dtype);
  const bool resident = item.from == BufferId::resident;
  const std::byte* sends = item.to == BufferId::send_0 ? addresses.sends[0] : addresses.sends[1];
  const std::int64_t heads = resident ? problem.kv_heads : block.kv_heads.count;
  const Piece piece = resident ? piece_of(plan, item.from_rows[0]) : Piece{};
  const std::int64_t rows = resident ? piece.rows : block.rows_global.count();
  const std::byte* from = resident ? addresses.resident + piece.offset_bytes : slot_of(addresses, item.from) + item.from_offset_bytes;
  std::map<std::int64_t, std::int64_t> moved;  // from where to where
  for (const kernels::PackTask& task : tasks) {
    for (std::int64_t b = 0; b < task.batch; ++b) {
      for (std::int64_t row = 0; row < task.rows; ++row) {
        for (std::int64_t head = 0; head < task.heads; ++head) {
          const std::int64_t at = b * task.src_batch_stride + row * task.src_row_stride + head * task.src_head_stride;
          const std::int64_t to = ((b * task.rows + row) * task.heads + head) * vector_bytes;
          const bool added = moved.emplace(distance(sends, task.dst) + to, distance(from, task.src) + at * task.element_size).second;
          REQUIRE((added && task.head_dim * task.element_size == vector_bytes));
        }
      }
    }
  }
  std::int64_t to = item.to_offset_bytes;
  for (std::int64_t tensor_and_batch = 0; tensor_and_batch < 2 * problem.batch; ++tensor_and_batch) {
    for (std::int64_t row = 0; row < block.rows_global.count(); ++row) {
      for (std::int64_t head = 0; head < block.kv_heads.count; ++head) {
        const std::int64_t from_row = resident ? item.from_rows[row] - piece.first : row;
        const std::int64_t from_head = resident ? block.kv_heads[head] : head;
        REQUIRE(moved.at(to) == ((tensor_and_batch * rows + from_row) * heads + from_head) * vector_bytes);
        to += vector_bytes;
      }
    }
  }
  REQUIRE(std::ssize(moved) * vector_bytes == block.bytes);
}

}  // namespace

TEST_CASE("lowered tasks of random plans name the elements that their items name") {
  const std::uint64_t seed = 21;
  INFO("seed " << seed);
  std::int64_t tasks = 0;
  std::int64_t packs = 0;
  std::int64_t packs_apart = 0;  // of several runs of rows
  for (std::int64_t number = 0; number < 400; ++number) {
    const RandomCase drawn = random_case(seed, number, std::nullopt);
    if (drawn.problem.seq_len > 200) { continue; }
    INFO("case " << number << ": " << drawn.describe());
    const Partition partition(drawn.partition, drawn.problem.seq_len, drawn.ranks);
    for (std::int64_t rank = 0; rank < drawn.ranks; ++rank) {
      const RingPlan plan = make_plan(drawn.problem, drawn.pattern, partition, {drawn.schedule}, rank);
      const TensorAddresses addresses = some_addresses();
      const std::vector<kernels::PartialPointers> partials = partials_of(plan);
      const std::vector<LoweredTransfers> transfers = lower_transfers(plan, addresses);
      const LoweredWork lowered = lower_work(plan, addresses, partials, kAccumulator);
      REQUIRE(transfers.size() == plan.steps.size());
      REQUIRE(lowered.attend.size() == plan.steps.size());
      REQUIRE(lowered.finish.partials == plan.partials);
      for (std::size_t step = 0; step < plan.steps.size(); ++step) {
        const Step& from = plan.steps[step];
        const LoweredTransfers& to = transfers[step];
        const std::vector<kernels::AttendTask>& attend = lowered.attend[step];
        REQUIRE(to.outgoing.size() == from.sends.size());
        REQUIRE(to.incoming.size() == from.receives.size());
        std::size_t next = 0;
        for (const WorkItem& item : from.work) {
          for (const ItemPart& part : parts_of(plan.problem, item)) {
            REQUIRE(next < attend.size());
            check_task(plan, addresses, partials[static_cast<std::size_t>(item.partial)], item, part, attend[next++]);
          }
        }
        REQUIRE(next == attend.size());
        std::span<const kernels::PackTask> packs_left(to.pack);
        for (const PackItem& item : from.packs) {
          const bool apart = item.from == BufferId::resident && item.from_rows.runs() > 1;
          const std::int64_t of_item = apart ? 2 * plan.problem.batch * item.from_rows.runs() : 2;
          REQUIRE(of_item <= std::ssize(packs_left));
          check_pack(plan, addresses, item, packs_left.first(static_cast<std::size_t>(of_item)));
          packs_left = packs_left.subspan(static_cast<std::size_t>(of_item));
          packs_apart += apart ? 1 : 0;
        }
        REQUIRE(packs_left.empty());
        tasks += std::ssize(from.work);
        packs += std::ssize(from.packs);
      }
    }
  }
  CHECK(tasks > 1000);
  CHECK(packs > 100);
  CHECK(packs_apart > 10);
}

TEST_CASE("a plan is not lowered to fewer partials than it folds into") {
  Problem problem;
  problem.seq_len = 16;
  Pattern pattern;
  pattern.branches = {{8, 1}, {16, 2}};
  pattern.head_split = HeadSplit::all;
  pattern.mixing = Mixing::mean;
  const RingPlan plan = make_plan(problem, pattern, Partition(PartitionKind::contiguous, 16, 1), {}, 0);
  std::vector<kernels::PartialPointers> partials = partials_of(plan);
  partials.pop_back();
  CHECK_THROWS_AS(lower_work(plan, some_addresses(), partials, kAccumulator), InvalidArgument);
}
