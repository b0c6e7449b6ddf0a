// SPDX-License-Identifier: Apache-2.0
// The records of the fused kernel, row by row, against the plan that they are made from.
#include <annulus/attention/fused_program.hpp>

#include <annulus/attention/attention_kernel.hpp>
#include <annulus/core/error.hpp>
#include <annulus/verify/random_problem.hpp>
#include <annulus_test.hpp>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

using namespace annulus;
namespace fused = kernels::cuda::fused;

namespace {

/// A row of Q of one head, and of which branch.
using QueryRow = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;  // branch, batch, local row, head
/// A key of it: how it is stored, and which part of its keys a row meets.
using Key = std::tuple<BufferId, std::int64_t, std::int64_t, std::int64_t, std::int64_t, kernels::Mask, kernels::KeyPart, std::int64_t>;
/// By step.
using Meetings = std::map<std::pair<std::int64_t, QueryRow>, std::multiset<Key>>;

/// The first local row of the piece of the shard in which a local row lies.
std::int64_t first_of_piece(const RingPlan& plan, std::int64_t row) {
  std::int64_t first = 0;
  for (const ShardPiece& piece : plan.shard.pieces) {
    if (row < first + piece.global.count) { break; }
    first += piece.global.count;
  }
  return first;
}

/// What the items of a plan say, element by element.
Meetings meetings_of(const RingPlan& plan) {
  Meetings meetings;
  for (std::size_t step = 0; step < plan.steps.size(); ++step) {
    for (const WorkItem& item : plan.steps[step].work) {
      const bool resident = item.keys.block < 0;
      const Progression stored_heads =
          resident ? range(0, plan.problem.kv_heads) : plan.blocks[static_cast<std::size_t>(item.keys.block)].kv_heads;
      const bool extra = item.k_global[0] >= plan.problem.seq_len;
      const Branch branch = extra ? Branch{plan.problem.seq_len, 1} : plan.pattern.branches[static_cast<std::size_t>(item.branch)];
      const bool in_tail = (item.segment + 1) * branch.segment_length > plan.problem.seq_len;
      const std::int64_t rate = plan.pattern.ragged == Ragged::dense_tail && in_tail ? 1 : branch.dilation_rate;
      for (std::int64_t b = 0; b < plan.problem.batch; ++b) {
        for (std::int64_t s = 0; s < item.segments; ++s) {
          for (std::int64_t j = 0; j < item.heads.kv.count; ++j) {
            std::int64_t stored_head = 0;
            while (stored_heads[stored_head] != item.heads.kv[j]) { ++stored_head; }
            for (std::int64_t i = 0; i < item.heads.q_per_kv; ++i) {
              const std::int64_t head = item.heads.q_first + j * item.heads.kv.stride * plan.problem.group_size() + i;
              for (std::int64_t q = 0; q < item.q_local.count(); ++q) {
                const QueryRow row{item.branch, b, item.q_local[q] + s * item.segment_stride, head};
                auto& keys = meetings[{static_cast<std::int64_t>(step), row}];
                for (std::int64_t k = 0; k < item.k_global.count(); ++k) {
                  const bool hidden = !extra && item.k_global[k] + s * item.segment_stride >= plan.problem.kv_length(b);
                  if (hidden) { continue; }
                  const std::int64_t stored =
                      (resident ? item.k_local[k] - first_of_piece(plan, item.k_local[0]) : item.k_packed[k]) + s * item.segment_stride;
                  // Rows that wrap turned over have no distance in tokens; without a mask and an order of keys nobody asks. Of stripes,
                  // whose rows are further apart than the segment's, the first query may come before the first key.
                  const std::int64_t apart = item.k_global.count() > 1   ? item.k_global[1] - item.k_global[0]
                                             : item.q_global.count() > 1 ? item.q_global[1] - item.q_global[0]
                                                                         : rate;
                  const std::int64_t first_ahead = extra ? 0
                                                   : plan.routing.key_order == KeyOrder::cyclic
                                                       ? item.place.q_first - item.place.k_first
                                                       : floor_div(item.q_global[0] - item.k_global[0], apart);
                  const std::int64_t ahead = first_ahead + q - k;
                  if (item.mask == kernels::Mask::causal) { REQUIRE((ahead >= 0) == (item.k_global[k] <= item.q_global[q])); }
                  keys.insert({item.keys.buffer, item.keys.offset_bytes, b, stored, stored_head, item.mask, item.place.part, ahead});
                }
              }
            }
          }
        }
      }
    }
  }
  return meetings;
}

/// What a record says of query row `i` of head (j, h) of it.
void add_record(Meetings& meetings, const FusedProgram& program, const fused::Record& record, std::int64_t step, const QueryRow& row,
                std::int64_t i, std::int64_t j) {
  auto& keys = meetings[{step, row}];
  const KeyTensor& tensor = program.keys[static_cast<std::size_t>((record.kv - 1) / 2)];
  for (std::int64_t k = 0; k < record.k_rows; ++k) {
    keys.insert({tensor.buffer, tensor.offset_bytes, record.k_batch, record.k_first + k * record.k_stride,
                 record.k_head + j * record.k_head_step, record.mask, record.part, i + record.diagonal - k});
  }
}

/// The place of a row in the partials, as the kernel that combines them finds it.
std::optional<std::int64_t> place_in(const fused::CombineEntry& entry, std::int64_t batch, std::int64_t row) {
  for (std::int64_t s = 0; s < entry.segments; ++s) {
    const std::int64_t inside = row - entry.first - s * entry.segment_stride;
    if (inside < 0 || inside % entry.stride != 0 || inside / entry.stride >= entry.count) { continue; }
    const std::int64_t index = inside / entry.stride;
    return (entry.partial + batch * entry.batch_step + s * entry.segment_step) * fused::kGroupRows + index;
  }
  return std::nullopt;
}

struct Counts {
  std::int64_t records = 0;
  std::int64_t combined = 0;
  std::int64_t carried = 0;
};

void check_program(const RingPlan& plan, Counts& counts) {
  const FusedProgram program = fused_program(plan);
  std::int64_t rows_before = 0;
  for (std::size_t i = 0; i < plan.shard.pieces.size(); ++i) {
    const Problem& problem = plan.problem;
    const std::int64_t row_bytes = 2 * problem.batch * problem.kv_heads * problem.head_dim * size_of(problem.dtype);
    const std::int64_t rows = plan.shard.pieces[i].global.count;
    REQUIRE(program.keys[i] == KeyTensor{BufferId::resident, rows_before * row_bytes, rows, problem.kv_heads});
    rows_before += rows;
  }
  // Which branch a record is of, its rows say: a head and a partial belong to one.
  std::map<std::int64_t, std::int64_t> branch_of_place;
  for (std::int64_t head = 0; !program.entries.empty() && head < plan.problem.heads; ++head) {
    std::int64_t entry = program.begin[static_cast<std::size_t>(head)];
    // Every row meets the extra keys once, apart from its branches: also where the rows of the shard lie in several pieces.
    std::map<std::pair<std::int64_t, std::int64_t>, int> extra_places;
    for (; entry < program.begin[static_cast<std::size_t>(head) + 1]; ++entry) {
      for (std::int64_t b = 0; b < plan.problem.batch; ++b) {
        for (std::int64_t row = 0; row < plan.local_rows; ++row) {
          const auto place = place_in(program.entries[static_cast<std::size_t>(entry)], b, row);
          if (!place) { continue; }
          REQUIRE(branch_of_place.emplace(*place, entry).second);
          if (program.entries[static_cast<std::size_t>(entry)].extra) { ++extra_places[{b, row}]; }
        }
      }
    }
    REQUIRE(std::ssize(extra_places) == (plan.problem.extra_keys > 0 ? plan.problem.batch * plan.local_rows : 0));
    for (const auto& [row, places] : extra_places) { REQUIRE(places == 1); }
  }
  Meetings of_records;
  std::map<QueryRow, std::int64_t> place_of_row;
  std::map<std::int64_t, QueryRow> row_of_place;
  std::map<QueryRow, std::pair<bool, bool>> begun_and_done;
  std::int64_t before = -1;
  std::int64_t tiles = 0;
  for (const FusedProgram::Launch& launch : program.launches) {
    REQUIRE(launch.step >= before);
    before = launch.step;
    tiles += launch.tiles;
    std::set<QueryRow> touched;
    for (const fused::Record& record : launch.records) {
      ++counts.records;
      REQUIRE(record.q == 0);
      REQUIRE(record.q_batch == record.k_batch);
      // Extra keys have no place from which an order of keys could be told.
      const bool extra = plan.problem.extra_keys > 0 && record.k_rows == plan.problem.extra_keys && record.diagonal == 0;
      REQUIRE((record.order == fused::KeyOrder::cyclic || extra || plan.routing.key_order != KeyOrder::cyclic));
      const std::int64_t units = (record.q_rows + fused::kGroupRows - 1) / fused::kGroupRows;
      for (std::int64_t j = 0; j < record.kv_heads; ++j) {
        for (std::int64_t h = 0; h < record.q_per_kv; ++h) {
          for (std::int64_t i = 0; i < record.q_rows; ++i) {
            const std::int64_t head = record.q_head + j * record.q_head_step + h;
            const std::int64_t local = record.q_first + i * record.q_stride;
            const std::int64_t place = (record.partial + (j * record.q_per_kv + h) * units) * fused::kGroupRows + i;
            // Of the branches that have this row, the one whose work has its stride and step; found by what the plan says of the row.
            std::int64_t branch = 0;
            if (!program.entries.empty()) {
              const std::int64_t entry = branch_of_place.at(place);
              const fused::CombineEntry& found = program.entries[static_cast<std::size_t>(entry)];
              REQUIRE(entry >= program.begin[static_cast<std::size_t>(head)]);
              REQUIRE(entry < program.begin[static_cast<std::size_t>(head) + 1]);
              REQUIRE(place_in(found, record.q_batch, local) == place);
              REQUIRE((!found.extra || extra));
              branch = entry;
            }
            const QueryRow row{branch, record.q_batch, local, head};
            REQUIRE(touched.insert(row).second);
            auto& [begun, done] = begun_and_done[row];
            REQUIRE_FALSE(done);
            REQUIRE(record.first == !begun);
            begun = true;
            done = record.last;
            const bool kept = !(record.first && record.last);
            if (kept) {
              REQUIRE(place < program.partials * fused::kGroupRows);
              REQUIRE(place_of_row.emplace(row, place).first->second == place);
              REQUIRE(row_of_place.emplace(place, row).first->second == row);
              ++counts.carried;
            }
            add_record(of_records, program, record, launch.step, row, i, j);
          }
        }
      }
    }
  }
  REQUIRE(tiles == program.tiles);
  for (const auto& [row, state] : begun_and_done) { REQUIRE(state.second == program.writes_rows); }
  counts.combined += program.writes_rows ? 0 : 1;
  if (program.writes_rows) {
    const auto rows = static_cast<std::int64_t>(begun_and_done.size());
    REQUIRE(program.begin.empty() == (rows == plan.problem.batch * plan.problem.heads * plan.local_rows));
  }

  // The same keys for the same rows in the same step. Branches of records are told apart by where their partials lie, so the sums over
  // the branches of a row are compared.
  const auto without_branch = [](const Meetings& meetings) {
    Meetings sums;
    for (const auto& [where, keys] : meetings) {
      const auto& [step, row] = where;
      const auto& [branch, batch, local, head] = row;
      sums[{step, {0, batch, local, head}}].insert(keys.begin(), keys.end());
    }
    return sums;
  };
  REQUIRE(without_branch(of_records) == without_branch(meetings_of(plan)));
}

}  // namespace

TEST_CASE("records of random plans meet the keys that their items name, each row in a partial of its own") {
  const std::uint64_t seed = 22;
  INFO("seed " << seed);
  Counts counts;
  for (std::int64_t number = 0; number < 300; ++number) {
    const RandomCase drawn = random_case(seed, number, std::nullopt, KernelKind::fused);
    if (drawn.problem.seq_len > 100) { continue; }
    INFO("case " << number << ": " << drawn.describe());
    REQUIRE(fused_obstacle(drawn.problem).empty());
    const Partition partition(drawn.partition, drawn.problem.seq_len, drawn.ranks);
    for (std::int64_t rank = 0; rank < drawn.ranks; ++rank) {
      // Blocks as small as the problems, so that rows have keys above their own.
      const bool cyclic = number % 2 == 0 && keeps_key_order(drawn.partition, drawn.schedule, drawn.problem.causal);
      const Routing routing = cyclic ? Routing{drawn.schedule, KeyOrder::cyclic, 8} : Routing{drawn.schedule};
      check_program(make_plan(drawn.problem, drawn.pattern, partition, routing, rank), counts);
    }
  }
  CHECK(counts.records > 2000);
  CHECK(counts.combined > 50);
  CHECK(counts.carried > 1000);
}

TEST_CASE("records of many segments of many rows have partials of their own") {
  Problem problem;
  problem.dtype = DType::bf16;
  problem.batch = 2;
  problem.seq_len = 800;
  problem.heads = 4;
  problem.kv_heads = 2;
  problem.head_dim = 16;
  Pattern pattern;
  pattern.branches = {{200, 1}, {400, 2}};
  pattern.head_split = HeadSplit::all;
  Counts counts;
  for (const Routing& routing : {Routing{Schedule::ring}, Routing{Schedule::ring, KeyOrder::cyclic, 128}}) {
    for (const std::int64_t ranks : {1, 2}) {
      for (std::int64_t rank = 0; rank < ranks; ++rank) {
        check_program(make_plan(problem, pattern, Partition(PartitionKind::contiguous, 800, ranks), routing, rank), counts);
      }
    }
  }
  CHECK(counts.combined == 6);
}

TEST_CASE("what the kernel would get wrong is not for it") {
  Problem problem;
  problem.dtype = DType::bf16;
  problem.head_dim = 64;
  problem.scale = 0.125;
  CHECK(fused_obstacle(problem).empty());
  for (const double scale : {-0.125, 0.0, 1e-300, -1e300, 1e300, 1e-44}) {
    problem.scale = scale;
    CHECK_THAT(fused_obstacle(problem), test::contains_text("a positive scale within fp32"));
    CHECK(resolve_kernel(KernelKind::automatic, problem, 0, true) == KernelKind::cublas);
    CHECK_THROWS_AS(resolve_kernel(KernelKind::fused, problem, 0, true), InvalidArgument);
  }
  problem.scale = 0.125;
  problem.head_dim = 60;
  CHECK_THAT(fused_obstacle(problem), test::contains_text("a multiple of 8"));
  problem.dtype = DType::fp32;
  CHECK_THAT(fused_obstacle(problem), test::contains_text("fp16 and bf16"));
}

TEST_CASE("a ring of one branch carries its partial and writes each row once, and one rank keeps none") {
  Problem problem;
  problem.dtype = DType::bf16;
  problem.seq_len = 1024;
  problem.heads = problem.kv_heads = 2;
  problem.head_dim = 64;
  const Routing routing{Schedule::ring, KeyOrder::cyclic, 128};
  const auto program_of = [&](std::int64_t ranks) {
    return fused_program(make_plan(problem, dense_pattern(1024), Partition(PartitionKind::contiguous, 1024, ranks), routing, 0));
  };
  CHECK(program_of(1).partials == 0);
  CHECK(program_of(1).launches.size() == 1);
  const FusedProgram four = program_of(4);
  CHECK(four.partials == 2 * 256 / 64);
  CHECK(four.launches.size() == 5);  // what lies above the own blocks comes last
  CHECK(four.writes_rows);
  CHECK(four.begin.empty());
}

TEST_CASE("a kernel is resolved by the problem and the GPUs, and refused with the reason") {
  Problem problem;
  problem.dtype = DType::bf16;
  problem.head_dim = 128;
  CHECK(resolve_kernel(KernelKind::automatic, problem, 0, true) == KernelKind::fused);
  CHECK(resolve_kernel(KernelKind::automatic, problem, 0, false) == KernelKind::cublas);
  CHECK(resolve_kernel(KernelKind::automatic, problem, 64, true) == KernelKind::cublas);
  CHECK(resolve_kernel(KernelKind::cublas, problem, 0, true) == KernelKind::cublas);
  CHECK_THROWS_WITH(resolve_kernel(KernelKind::fused, problem, 0, false), test::contains_text("compute capability 9.0"));
  CHECK_THROWS_WITH(resolve_kernel(KernelKind::fused, problem, 64, true), test::contains_text("--tile-rows"));
  problem.head_dim = 100;
  CHECK(resolve_kernel(KernelKind::automatic, problem, 0, true) == KernelKind::cublas);
  CHECK_THROWS_WITH(resolve_kernel(KernelKind::fused, problem, 0, true), test::contains_text("multiple of 8"));
  problem.head_dim = 128;
  problem.dtype = DType::fp32;
  CHECK(resolve_kernel(KernelKind::automatic, problem, 0, true) == KernelKind::cublas);
  CHECK_THROWS_WITH(resolve_kernel(KernelKind::fused, problem, 0, true), test::contains_text("fp16 and bf16"));
}
