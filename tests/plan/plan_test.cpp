// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/plan.hpp>

#include <annulus/core/error.hpp>
#include <annulus/pattern/grid_cell.hpp>
#include <annulus/plan/choice.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/coverage.hpp>
#include <annulus/plan/item_parts.hpp>
#include <annulus/plan/key_order.hpp>
#include <annulus/verify/random_problem.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

using namespace annulus;

namespace {

std::vector<RingPlan> plans_of(const Problem& problem, const Pattern& pattern, const Routing& routing, std::int64_t ranks,
                               PartitionKind kind = PartitionKind::contiguous) {
  const Partition partition(kind, problem.seq_len, ranks);
  std::vector<RingPlan> plans;
  for (std::int64_t rank = 0; rank < ranks; ++rank) { plans.push_back(make_plan(problem, pattern, partition, routing, rank)); }
  return plans;
}

std::vector<RingPlan> plans_of(const Problem& problem, const Pattern& pattern, Schedule schedule, std::int64_t ranks) {
  return plans_of(problem, pattern, Routing{schedule}, ranks);
}

/// A bound that only arithmetic without overflow meets.
bool is_near(double found, double expected) { return std::abs(found / expected - 1) < 1e-9; }

std::int64_t bytes_received(const std::vector<RingPlan>& plans) {
  return std::accumulate(plans.begin(), plans.end(), std::int64_t{0}, [](std::int64_t sum, const RingPlan& plan) {
    return sum + static_cast<std::int64_t>(plan_cost(plan).bytes_received);
  });
}

std::int64_t pairs_of(const std::vector<RingPlan>& plans) {
  return std::accumulate(plans.begin(), plans.end(), std::int64_t{0},
                         [](std::int64_t sum, const RingPlan& plan) { return sum + static_cast<std::int64_t>(plan_cost(plan).pairs); });
}

Problem problem_of(std::int64_t seq_len, std::int64_t heads, std::int64_t kv_heads, bool causal) {
  Problem problem;
  problem.seq_len = seq_len;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.head_dim = 128;
  problem.dtype = DType::bf16;
  problem.causal = causal;
  return problem;
}

Pattern longnet() {
  Pattern pattern;
  pattern.branches = {{2048, 1}, {4096, 2}, {8192, 4}, {16384, 8}};
  return pattern;
}

}  // namespace

TEST_CASE("the plans of random problems attend every visible pair exactly once, safely, and send nothing unused") {
  const std::uint64_t seed = 7;
  INFO("seed " << seed);
  int proven = 0;
  int fourth_slots = 0;  // for blocks that are met in two steps, beside others
  for (std::int64_t number = 0; number < 1500; ++number) {
    RandomCase drawn = random_case(seed, number, std::nullopt);
    // The proof costs seq_len^2 * heads * branches.
    if (drawn.problem.seq_len * drawn.problem.seq_len * drawn.problem.heads * static_cast<std::int64_t>(drawn.pattern.branches.size()) >
        400000) {
      continue;
    }
    ++proven;
    INFO("case " << number << ": " << drawn.describe());
    const std::vector<std::pair<PartitionKind, Routing>> ways{
        {PartitionKind::contiguous, {Schedule::ring}},
        {PartitionKind::contiguous, {Schedule::ring_full}},
        {PartitionKind::contiguous, {Schedule::ring, KeyOrder::cyclic, 4}},
        {PartitionKind::contiguous, {Schedule::ring_full, KeyOrder::cyclic, 8}},
        {PartitionKind::contiguous, {Schedule::direct}},
        {PartitionKind::contiguous, {Schedule::allgather}},
        {PartitionKind::contiguous, {Schedule::direct, KeyOrder::cyclic, 4}},
        {PartitionKind::contiguous, {Schedule::allgather, KeyOrder::cyclic, 8}},
        {PartitionKind::contiguous, {Schedule::ring, KeyOrder::arrival, 0, TileOrder::hilbert}},
        {PartitionKind::zigzag, {Schedule::direct, KeyOrder::arrival, 0, TileOrder::hilbert}},
        {PartitionKind::zigzag, {Schedule::ring_full}},
        {PartitionKind::zigzag, {Schedule::ring}},
        {PartitionKind::zigzag, {Schedule::direct}},
        {PartitionKind::zigzag, {Schedule::allgather}},
        {PartitionKind::zigzag, drawn.problem.causal ? Routing{Schedule::direct, KeyOrder::cyclic, 4} : Routing{Schedule::direct}},
        {PartitionKind::zigzag, drawn.problem.causal ? Routing{Schedule::allgather, KeyOrder::cyclic, 2} : Routing{Schedule::ring}},
        {PartitionKind::striped, {Schedule::ring}},
        {PartitionKind::striped, {Schedule::ring_full}},
        {PartitionKind::striped, {Schedule::direct}},
        {PartitionKind::striped, {Schedule::allgather}},
        {PartitionKind::striped, {Schedule::ring, KeyOrder::arrival, 0, TileOrder::hilbert}},
    };
    for (const auto& [partition, routing] : ways) {
      const std::vector<RingPlan> plans = plans_of(drawn.problem, drawn.pattern, routing, drawn.ranks, partition);
      const Coverage coverage = prove_coverage(plans);
      REQUIRE(coverage.pairs == pairs_of(plans));
      REQUIRE(coverage.bytes_moved == bytes_received(plans));
      for (const RingPlan& plan : plans) { fourth_slots += plan.slot_bytes[3] > 0 ? 1 : 0; }
    }
  }
  CHECK(proven > 500);
  CHECK(fourth_slots > 0);
}

TEST_CASE("the rings of a grid attend together what one rank attends, each pair once") {
  const std::uint64_t seed = 8;
  INFO("seed " << seed);
  int proven = 0;
  for (std::int64_t number = 0; number < 1500; ++number) {
    const RandomCase drawn = random_case(seed, number, std::nullopt);
    const Problem& whole = drawn.problem;
    const bool large = whole.seq_len * whole.seq_len * whole.heads * std::ssize(drawn.pattern.branches) > 400000;
    if (drawn.grid.rings() == 1 || large) { continue; }
    ++proven;
    INFO("case " << number << ": " << drawn.describe());
    const Grid grid = resolve_grid(drawn.grid, whole, drawn.ranks);
    std::int64_t pairs = 0;
    for (std::int64_t ring = 0; ring < grid.rings(); ++ring) {
      const Problem problem = cell_of(whole, grid, ring).problem;
      const std::vector<RingPlan> plans = plans_of(problem, drawn.pattern, Routing{drawn.schedule}, grid.seq, drawn.partition);
      const Coverage coverage = prove_coverage(plans);
      REQUIRE(coverage.bytes_moved == bytes_received(plans));
      pairs += coverage.pairs;
    }
    REQUIRE(pairs == prove_coverage(plans_of(whole, drawn.pattern, Routing{}, 1)).pairs);
  }
  CHECK(proven > 150);
}

TEST_CASE("tile-order hilbert visits neighbouring tiles one after the other, each once, however long the sequence") {
  for (const std::int64_t seq_len : {std::int64_t{1024}, std::int64_t{5000}, std::int64_t{65536}, std::int64_t{1} << 30}) {
    INFO(seq_len << " tokens");
    const Routing routing{Schedule::ring, KeyOrder::arrival, 0, TileOrder::hilbert};
    const std::vector<WorkItem> work = plans_of(problem_of(seq_len, 2, 2, false), dense_pattern(seq_len), routing, 1)[0].steps[0].work;
    const std::int64_t rows = ceil_div(ceil_div(seq_len, std::int64_t{8}), std::int64_t{128}) * 128;
    const std::int64_t tiles = ceil_div(seq_len, rows);
    const bool whole_square = tiles == 8;
    std::set<std::pair<std::int64_t, std::int64_t>> visited;
    std::pair<std::int64_t, std::int64_t> before{0, 0};
    std::int64_t wave = 0;
    for (const WorkItem& item : work) {
      const std::pair<std::int64_t, std::int64_t> tile{item.q_global.only().first / rows, item.k_global.only().first / rows};
      CHECK(item.q_global.only().first % rows == 0);
      CHECK(item.q_global.count() == std::min(rows, seq_len - tile.first * rows));
      CHECK(visited.insert(tile).second);
      const std::int64_t distance = std::abs(tile.first - before.first) + std::abs(tile.second - before.second);
      CHECK((!whole_square || distance == (visited.size() == 1 ? 0 : 1)));
      // A tile of the same queries waits for the one before; another may go with it.
      CHECK((visited.size() == 1 ? item.wave == 0 : item.wave == wave + (tile.first == before.first ? 1 : 0) || item.wave == wave + 1));
      wave = item.wave;
      before = tile;
    }
    CHECK(static_cast<std::int64_t>(visited.size()) == tiles * tiles);
  }
  Problem causal = problem_of(4096, 2, 2, true);
  const Routing routing{Schedule::ring, KeyOrder::arrival, 0, TileOrder::hilbert};
  CHECK(plans_of(causal, dense_pattern(4096), routing, 1)[0].steps[0].work.size() == 36);  // no tile that the mask hides
  CHECK_THROWS_AS(plans_of(causal, dense_pattern(4096), Routing{Schedule::ring, KeyOrder::cyclic, 128, TileOrder::hilbert}, 1),
                  InvalidArgument);
}

TEST_CASE("a grid that is chosen has as many rings as work can be dealt out to evenly") {
  const Grid automatic = grid_from("auto");
  const auto choose = [&](const Problem& problem, const Pattern& pattern, std::int64_t ranks) {
    return choose_grid(automatic, problem, pattern, PartitionKind::automatic, Schedule::automatic, ranks).grid;
  };
  Problem problem = problem_of(65536, 16, 2, false);
  const Pattern dense = dense_pattern(problem.seq_len);
  CHECK(choose(problem, dense, 1) == Grid{1, 1, 1});
  CHECK(choose(problem, dense, 4) == Grid{1, 4, 1});   // two ranks to a KV head
  CHECK(choose(problem, dense, 24) == Grid{1, 8, 3});  // 24 and 12 parts of 16 heads are not alike
  CHECK(choose(problem, dense, 64) == Grid{1, 16, 4});
  problem.batch = 3;
  CHECK(choose(problem, dense, 6) == Grid{3, 2, 1});
  CHECK(choose(problem, dense, 4) == Grid{1, 4, 1});
  problem = problem_of(65536, 3, 3, true);
  CHECK(choose(problem, dense, 4) == Grid{1, 1, 4});  // no part of 3 heads goes into 4 ranks

  // 16 heads for three branches: 6, 5 and 5, of other work each, which only a ring shares out.
  Pattern split = longnet();
  split.branches = {{2048, 1}, {65536, 1}, {8192, 8}};
  CHECK(choose(problem_of(65536, 16, 16, false), split, 2) == Grid{1, 1, 2});
  CHECK(choose_grid({1, 2, 0}, problem_of(65536, 16, 16, false), split, PartitionKind::automatic, Schedule::automatic, 4).reason.empty());
}

TEST_CASE("zigzag gives every rank the same work under a causal mask, in every step, and moves no more than ring-full") {
  for (const std::int64_t ranks : {2, 3, 8, 64}) {
    const Problem problem = problem_of(ranks * 2 * 40, 2, 1, true);
    const Pattern dense = dense_pattern(problem.seq_len);
    const std::vector<RingPlan> plans = plans_of(problem, dense, Routing{Schedule::ring_full}, ranks, PartitionKind::zigzag);
    if (ranks <= 8) { prove_coverage(plans); }
    const std::int64_t mean = pairs_of(plans) / ranks;
    for (const RingPlan& plan : plans) {
      const auto pairs = static_cast<std::int64_t>(plan_cost(plan).pairs);
      CHECK(std::abs(pairs - mean) * 100 <= mean);
      // Two pieces meet two pieces of the block in every step but the first, and one of the four pairs is hidden, or two are.
      for (std::size_t step = 1; step < plan.steps.size(); ++step) {
        Int128 of_step = 0;
        for (const WorkItem& item : plan.steps[step].work) { of_step += visible_pairs(plan.problem, item); }
        CHECK(of_step == Int128{2} * 40 * 40 * problem.heads);
      }
    }
    CHECK(pairs_of(plans) == problem.seq_len * (problem.seq_len + 1) / 2 * problem.heads);
    CHECK(bytes_received(plans) == bytes_received(plans_of(problem, dense, Schedule::ring_full, ranks)));
  }
  const Problem problem = problem_of(64, 1, 1, true);
  const Partition partition(PartitionKind::zigzag, 64, 4);
  CHECK_THROWS_AS(make_plan(problem, dense_pattern(64), partition, Routing{Schedule::ring, KeyOrder::cyclic, 8}, 0), InvalidArgument);
  CHECK_THROWS_AS(make_plan(problem, dense_pattern(64), partition, Routing{Schedule::ring_full, KeyOrder::cyclic, 8}, 0), InvalidArgument);
}

TEST_CASE("striped gives every rank the same work in every causal segment, in every step, and moves no more than ring-full") {
  for (const std::int64_t ranks : {2, 3, 8, 64}) {
    const std::int64_t rows = 40;  // of a rank in a segment
    const Problem problem = problem_of(ranks * rows * 3, 2, 1, true);
    Pattern segments = dense_pattern(problem.seq_len);
    segments.branches = {{ranks * rows, 1}};
    const std::vector<RingPlan> plans = plans_of(problem, segments, Routing{Schedule::ring}, ranks, PartitionKind::striped);
    if (ranks <= 8) { prove_coverage(plans); }
    for (const RingPlan& plan : plans) {
      REQUIRE(plan.steps.size() == static_cast<std::size_t>(ranks));
      for (const Step& step : plan.steps) {
        // A query sees as many keys of another rank as of its own, or one fewer where that rank's come after its own.
        Int128 of_step = 0;
        for (const WorkItem& item : step.work) { of_step += visible_pairs(plan.problem, item); }
        const Int128 with_own = Int128{3} * rows * (rows + 1) / 2 * problem.heads;
        CHECK((of_step == with_own || of_step == with_own - Int128{3} * rows * problem.heads));
      }
    }
    CHECK(pairs_of(plans) == 3 * ranks * rows * (ranks * rows + 1) / 2 * problem.heads);
    const Routing full{Schedule::ring_full};
    CHECK(bytes_received(plans) == bytes_received(plans_of(problem, segments, full, ranks, PartitionKind::striped)));
  }
  const Partition partition(PartitionKind::striped, 64, 4);
  const Problem problem = problem_of(64, 1, 1, true);
  CHECK_THROWS_AS(make_plan(problem, dense_pattern(64), partition, Routing{Schedule::direct, KeyOrder::cyclic, 8}, 0), InvalidArgument);
}

TEST_CASE("a plan of stripes of a sequence in one segment does not grow with the sequence") {
  for (const std::int64_t rate : {1, 3, 8}) {
    const auto plan_of = [&](std::int64_t seq_len) {
      Pattern pattern = dense_pattern(seq_len);
      pattern.branches = {{seq_len, rate}};
      const Problem problem = problem_of(seq_len, 2, 1, true);
      return make_plan(problem, pattern, Partition(PartitionKind::striped, seq_len, 8), Routing{Schedule::ring}, 3);
    };
    const RingPlan small = plan_of(4096);
    const RingPlan large = plan_of(std::int64_t{1} << 40);

    CHECK(small.blocks.size() == large.blocks.size());
    REQUIRE(small.steps.size() == large.steps.size());
    for (std::size_t step = 0; step < small.steps.size(); ++step) {
      CHECK(small.steps[static_cast<std::int64_t>(step)].work.size() == large.steps[static_cast<std::int64_t>(step)].work.size());
    }
  }
}

TEST_CASE("a dense pattern is the classic ring") {
  const Problem problem = problem_of(64, 4, 2, false);
  const std::vector<RingPlan> pruned = plans_of(problem, dense_pattern(64), Schedule::ring, 4);
  const std::vector<RingPlan> full = plans_of(problem, dense_pattern(64), Schedule::ring_full, 4);
  CHECK(bytes_received(pruned) == bytes_received(full));
  for (const RingPlan& plan : pruned) {
    REQUIRE(plan.steps.size() == 4);
    for (std::size_t step = 1; step < 4; ++step) {
      REQUIRE(plan.steps[step].sends.size() == 1);
      CHECK(plan.steps[step].sends[0].peer == (plan.rank + 1) % 4);
      CHECK(plan.steps[step].packs.empty());
      const std::int64_t owner = (plan.rank + 4 - static_cast<std::int64_t>(step)) % 4;
      CHECK(plan.blocks[static_cast<std::size_t>(plan.steps[step].receives.at(0).blocks.at(0))].owner == owner);
    }
  }
}

TEST_CASE("under causal a block never goes to a rank whose queries all precede it") {
  const std::vector<RingPlan> plans = plans_of(problem_of(64, 4, 4, true), dense_pattern(64), Schedule::ring, 4);
  for (const RingPlan& plan : plans) {
    for (const KvBlock& block : plan.blocks) { CHECK(block.owner <= plan.rank); }
    CHECK(plan_cost(plan).bytes_received == plan.rank * 16 * 4 * 128 * 2 * 2);
  }
}

TEST_CASE("a segment over three shards is a ring of three and segments inside shards send nothing") {
  Pattern pattern;
  pattern.branches = {{24, 1}};
  const std::vector<RingPlan> three = plans_of(problem_of(48, 2, 2, false), pattern, Schedule::ring, 6);
  for (const RingPlan& plan : three) {
    CHECK(plan.steps.size() == 3);
    for (const LinkBytes& link : plan_cost(plan).links) { CHECK(link.peer / 3 == plan.rank / 3); }
  }
  pattern.branches = {{8, 1}, {4, 2}};
  CHECK(bytes_received(plans_of(problem_of(48, 2, 2, false), pattern, Schedule::ring, 6)) == 0);
}

TEST_CASE("the LongNet pattern moves exactly 1/224 of ring-full's bytes with grouped heads and 1/56 with all") {
  Pattern pattern = longnet();
  for (const OffsetRule offset : {OffsetRule::group, OffsetRule::head}) {
    pattern.offset = offset;
    for (const std::int64_t kv_heads : {4, 8, 16}) {
      const Problem problem = problem_of(65536, 16, kv_heads, false);
      pattern.head_split = HeadSplit::first;
      const std::int64_t full = bytes_received(plans_of(problem, pattern, Schedule::ring_full, 8));
      CHECK(full == 7 * 8 * 8192 * kv_heads * 128 * 2 * 2);
      CHECK(224 * bytes_received(plans_of(problem, pattern, Schedule::ring, 8)) == full);
      pattern.head_split = HeadSplit::all;
      CHECK(56 * bytes_received(plans_of(problem, pattern, Schedule::ring, 8)) == full);
    }
  }
  CHECK(bytes_received(plans_of(problem_of(65536, 16, 16, false), longnet(), Schedule::ring, 4)) == 0);
}

TEST_CASE("a plan's size follows the pattern, not the sequence") {
  Problem problem = problem_of(std::int64_t{1} << 30, 16, 16, true);
  Pattern pattern = longnet();
  pattern.head_split = HeadSplit::all;
  pattern.offset = OffsetRule::head;
  const Partition partition(PartitionKind::contiguous, problem.seq_len, 1024);
  const RingPlan plan = make_plan(problem, pattern, partition, {Schedule::ring}, 77);
  std::size_t items = 0;
  for (const Step& step : plan.steps) { items += step.work.size(); }
  CHECK(items <= 64);
  CHECK(plan_memory(plan.problem, sizes_of(plan), whole_partials_bytes(plan.problem, sizes_of(plan), 4)).total() > 0);
}

TEST_CASE("costs count pairs under the mask exactly") {
  // 10 tokens, causal, dense: 55 pairs per head.
  Problem problem = problem_of(10, 3, 3, true);
  for (const std::int64_t ranks : {1, 2, 3, 10, 12}) {
    CHECK(pairs_of(plans_of(problem, dense_pattern(10), Schedule::ring, ranks)) == 3 * 55);
  }
}

TEST_CASE("memory per rank falls with the number of ranks") {
  const Problem problem = problem_of(131072, 8, 8, false);
  const auto memory = [&](std::int64_t ranks) {
    const RingPlan plan = plans_of(problem, dense_pattern(131072), Schedule::ring, ranks).front();
    return plan_memory(plan.problem, sizes_of(plan), whole_partials_bytes(plan.problem, sizes_of(plan), 4));
  };
  const MemoryPlan one = memory(1);
  const MemoryPlan four = memory(4);
  CHECK(one.slots == 0);
  CHECK(4 * four.inputs == one.inputs);
  CHECK(4 * four.partials == one.partials);
  CHECK(4 * four.outputs == one.outputs);
  CHECK(four.slots == 2 * 2 * 32768 * 8 * 128 * 2);
}

TEST_CASE("a plan refuses a partition of another length") {
  const Partition partition(PartitionKind::contiguous, 8, 2);
  CHECK_THROWS_AS(make_plan(problem_of(9, 1, 1, false), dense_pattern(9), partition, {Schedule::ring}, 0), InvalidArgument);
  CHECK_THROWS_AS(make_plan(problem_of(8, 1, 1, false), dense_pattern(8), partition, {Schedule::ring}, 2), InvalidArgument);
}

TEST_CASE("the proof catches plans that are wrong") {
  const Problem problem = problem_of(24, 2, 2, false);
  const std::vector<RingPlan> good = plans_of(problem, dense_pattern(24), Schedule::ring, 3);
  REQUIRE_NOTHROW(prove_coverage(good));

  auto twice = good;
  twice[1].steps[1].work.push_back(twice[1].steps[1].work.front());
  CHECK_THROWS_AS(prove_coverage(twice), AssertionFailure);

  auto missing = good;
  missing[2].steps[2].work.clear();
  CHECK_THROWS_AS(prove_coverage(missing), AssertionFailure);

  auto overwritten = good;
  overwritten[0].steps[2].receives[0].buffer = BufferId::slot_1;
  CHECK_THROWS_AS(prove_coverage(overwritten), AssertionFailure);

  auto misdirected = good;
  misdirected[0].steps[1].sends[0].peer = 2;
  CHECK_THROWS_AS(prove_coverage(misdirected), AssertionFailure);

  auto short_message = good;
  short_message[0].steps[1].sends[0].bytes -= 2;
  CHECK_THROWS_AS(prove_coverage(short_message), AssertionFailure);
}

TEST_CASE("the proof catches buffers that are larger than needed") {
  const Problem problem = problem_of(24, 2, 2, false);
  auto plans = plans_of(problem, dense_pattern(24), Schedule::ring, 3);
  REQUIRE_NOTHROW(prove_coverage(plans));
  plans[1].slot_bytes[0] += 2;
  CHECK_THROWS_AS(prove_coverage(plans), AssertionFailure);
  plans[1].slot_bytes[0] -= 2;
  plans[2].send_bytes[1] += 100;
  CHECK_THROWS_AS(prove_coverage(plans), AssertionFailure);
}

TEST_CASE("the proof follows rows through a shard of several pieces") {
  const Problem problem = problem_of(24, 2, 2, true);
  const auto pieces = plans_of(problem, dense_pattern(24), Routing{Schedule::ring_full}, 2, PartitionKind::zigzag);
  REQUIRE(pieces[0].shard.pieces == std::vector<ShardPiece>{{range(0, 6), 0}, {range(18, 24), 6}});
  REQUIRE_NOTHROW(prove_coverage(pieces));

  auto swapped = pieces;
  swapped[0].shard.pieces = {{range(0, 6), 6}, {range(18, 24), 0}};
  CHECK_THROWS_AS(prove_coverage(swapped), AssertionFailure);

  auto shifted = pieces;
  shifted[0].shard.pieces[1].global = range(17, 23);
  CHECK_THROWS_AS(prove_coverage(shifted), AssertionFailure);

  auto gap = pieces;
  gap[0].shard.pieces[1].local_first = 7;
  CHECK_THROWS_AS(prove_coverage(gap), AssertionFailure);

  auto twice = pieces;
  twice[1].shard.pieces[0].global = range(5, 11);
  CHECK_THROWS_AS(prove_coverage(twice), AssertionFailure);

  auto elsewhere = pieces;
  for (WorkItem& item : elsewhere[0].steps[0].work) { item.keys.offset_bytes = 0; }
  CHECK_THROWS_AS(prove_coverage(elsewhere), AssertionFailure);

  auto sent_from_elsewhere = pieces;
  sent_from_elsewhere[0].steps[1].sends[0].offset_bytes += 2;
  CHECK_THROWS_AS(prove_coverage(sent_from_elsewhere), AssertionFailure);
}

TEST_CASE("the proof catches a send of what was never packed") {
  Pattern pattern;
  pattern.branches = {{32, 2}};
  auto plans = plans_of(problem_of(32, 2, 2, false), pattern, Schedule::ring, 4);
  REQUIRE_NOTHROW(prove_coverage(plans));
  const auto packing = std::find_if(plans[0].steps.begin(), plans[0].steps.end(), [](const Step& step) { return !step.packs.empty(); });
  REQUIRE(packing != plans[0].steps.end());
  packing->packs.clear();
  CHECK_THROWS_AS(prove_coverage(plans), AssertionFailure);
}

TEST_CASE("the proof catches packs of other rows, and packs that overwrite each other") {
  Pattern pattern;
  pattern.branches = {{32, 2}, {32, 1}};
  pattern.head_split = HeadSplit::all;
  const auto good = plans_of(problem_of(32, 2, 2, false), pattern, Schedule::ring, 4);
  REQUIRE_NOTHROW(prove_coverage(good));
  REQUIRE(good[0].steps[1].packs.size() == 2);

  auto other_rows = good;
  other_rows[0].steps[1].packs[0].from_rows = Rows<Local>(Progression{1, 2, 4});
  CHECK_THROWS_AS(prove_coverage(other_rows), AssertionFailure);

  auto fewer_rows = good;
  fewer_rows[0].steps[1].packs[0].from_rows = Rows<Local>(Progression{0, 2, 3});
  CHECK_THROWS_AS(prove_coverage(fewer_rows), AssertionFailure);

  auto overwritten = good;
  overwritten[0].steps[1].packs[1].to_offset_bytes = overwritten[0].steps[1].packs[0].to_offset_bytes + 2;
  CHECK_THROWS_AS(prove_coverage(overwritten), AssertionFailure);

  auto into_the_other = good;
  into_the_other[0].steps[1].packs[0].to = BufferId::send_0;
  CHECK_THROWS_AS(prove_coverage(into_the_other), AssertionFailure);
}

TEST_CASE("the proof catches items of one wave that fold into the same rows") {
  Pattern pattern;
  pattern.branches = {{8, 2}, {24, 1}};
  pattern.head_split = HeadSplit::all;
  const auto good = plans_of(problem_of(24, 2, 2, false), pattern, Schedule::ring, 3);
  REQUIRE_NOTHROW(prove_coverage(good));
  REQUIRE(good[0].steps[0].work.back().wave == 1);

  auto together = good;
  for (WorkItem& item : together[0].steps[0].work) { item.wave = 0; }
  CHECK_THROWS_AS(prove_coverage(together), AssertionFailure);

  auto descending = good;
  std::reverse(descending[0].steps[0].work.begin(), descending[0].steps[0].work.end());
  CHECK_THROWS_AS(prove_coverage(descending), AssertionFailure);

  auto no_partial = good;
  no_partial[0].steps[0].work[0].partial = 1;
  CHECK_THROWS_AS(prove_coverage(no_partial), AssertionFailure);
}

TEST_CASE("where each head has one branch, a step is one wave but for a segment's several blocks") {
  Pattern pattern = longnet();
  pattern.offset = OffsetRule::head;
  for (const RingPlan& plan : plans_of(problem_of(65536, 16, 16, false), pattern, Schedule::ring, 8)) {
    for (const Step& step : plan.steps) {
      for (const WorkItem& item : step.work) { CHECK(item.wave == 0); }
    }
  }
}

TEST_CASE("the proof catches ops that are missing, repeated or out of order") {
  Pattern pattern;
  pattern.branches = {{32, 2}};
  const auto good = plans_of(problem_of(32, 2, 2, false), pattern, Schedule::ring, 4);
  REQUIRE_NOTHROW(prove_coverage(good));

  for (std::size_t index = 0; index < good[1].ops.size(); ++index) {
    auto missing = good;
    missing[1].ops.erase(missing[1].ops.begin() + static_cast<std::ptrdiff_t>(index));
    CHECK_THROWS_AS(prove_coverage(missing), AssertionFailure);

    auto repeated = good;
    repeated[1].ops.insert(repeated[1].ops.begin() + static_cast<std::ptrdiff_t>(index), good[1].ops[index]);
    CHECK_THROWS_AS(prove_coverage(repeated), AssertionFailure);

    if (index == 0) { continue; }
    auto swapped = good;
    std::swap(swapped[1].ops[index - 1], swapped[1].ops[index]);
    CHECK_THROWS_AS(prove_coverage(swapped), AssertionFailure);
  }
}

TEST_CASE("under a cyclic order, what lies above a block of resident keys comes after the last block, in a wave of its own") {
  const auto plans = plans_of(problem_of(96, 2, 2, false), dense_pattern(96), Routing{Schedule::ring, KeyOrder::cyclic, 8}, 3);
  REQUIRE_NOTHROW(prove_coverage(plans));
  for (const RingPlan& plan : plans) {
    REQUIRE(plan.steps.size() == 3);
    REQUIRE(plan.steps[0].work.size() == 1);
    CHECK(plan.steps[0].work[0].place.part == kernels::KeyPart::down);
    CHECK(plan.steps[1].work.size() == 1);
    REQUIRE(plan.steps[2].work.size() == 2);
    CHECK(plan.steps[2].work[0].place.part == kernels::KeyPart::all);
    CHECK(plan.steps[2].work[1].place.part == kernels::KeyPart::above);
    CHECK(plan.steps[2].work[1].keys.block == -1);
    CHECK(plan.steps[2].work[1].wave == 1);
  }
}

TEST_CASE("the proof catches keys in another order than on one rank") {
  const auto good = plans_of(problem_of(96, 2, 2, false), dense_pattern(96), Routing{Schedule::ring, KeyOrder::cyclic, 8}, 3);
  REQUIRE_NOTHROW(prove_coverage(good));

  auto all_at_once = good;
  all_at_once[0].steps[0].work[0].place.part = kernels::KeyPart::all;
  all_at_once[0].steps[2].work.pop_back();
  CHECK_THROWS_AS(prove_coverage(all_at_once), AssertionFailure);

  auto before_the_block = good;
  std::swap(before_the_block[1].steps[2].work[0], before_the_block[1].steps[2].work[1]);
  std::swap(before_the_block[1].steps[2].work[0].wave, before_the_block[1].steps[2].work[1].wave);
  CHECK_THROWS_AS(prove_coverage(before_the_block), AssertionFailure);

  auto lost = good;
  lost[2].steps[2].work.pop_back();
  CHECK_THROWS_AS(prove_coverage(lost), AssertionFailure);

  auto misplaced = good;
  misplaced[2].steps[1].work[0].place.k_first += 8;
  CHECK_THROWS_AS(prove_coverage(misplaced), AssertionFailure);
}

TEST_CASE("under direct every rank of a causal zigzag does one piece against one piece in each step, in three slots") {
  for (const std::int64_t ranks : {2, 3, 8, 16}) {
    const std::int64_t piece = 16;
    const Problem problem = problem_of(ranks * 2 * piece, 2, 1, true);
    const Routing routing{Schedule::direct, KeyOrder::cyclic, 8};
    const std::vector<RingPlan> plans = plans_of(problem, dense_pattern(problem.seq_len), routing, ranks, PartitionKind::zigzag);
    if (ranks <= 3) { prove_coverage(plans); }
    for (const RingPlan& plan : plans) {
      INFO("rank " << plan.rank << " of " << ranks);
      CHECK(std::ssize(plan.steps) == 2 * ranks);
      CHECK(plan.slot_bytes[3] == 0);
      Int128 so_far = 0;
      for (std::int64_t number = 0; number < std::ssize(plan.steps); ++number) {
        const Step& step = plan.steps[static_cast<std::size_t>(number)];
        CHECK(step.receives.size() <= 1);
        for (const WorkItem& item : step.work) { so_far += visible_pairs(plan.problem, item); }
        CHECK(so_far == problem.heads * ((number + 1) * piece * piece + piece));
      }
      CHECK(so_far == problem.heads * (2 * ranks * piece * piece + piece));
    }
    CHECK(bytes_received(plans) <=
          bytes_received(plans_of(problem, dense_pattern(problem.seq_len), Routing{Schedule::ring_full}, ranks, PartitionKind::zigzag)));
  }
}

TEST_CASE("allgather takes all in one step, and memory for it") {
  const Problem problem = problem_of(64, 4, 2, false);
  const std::vector<RingPlan> gathered = plans_of(problem, dense_pattern(64), Schedule::allgather, 4);
  const std::vector<RingPlan> ring = plans_of(problem, dense_pattern(64), Schedule::ring, 4);
  for (std::size_t rank = 0; rank < 4; ++rank) {
    CHECK(gathered[rank].steps.size() == 2);
    CHECK(gathered[rank].steps[1].receives.size() == 3);
    CHECK(gathered[rank].slot_bytes[1] == 3 * ring[rank].slot_bytes[1]);
  }
  CHECK(bytes_received(gathered) == bytes_received(ring));
}

TEST_CASE("the proof catches a slot that is filled again between the two steps of its block") {
  const Routing routing{Schedule::direct, KeyOrder::cyclic, 8};
  auto plans = plans_of(problem_of(96, 1, 1, true), dense_pattern(96), routing, 4, PartitionKind::zigzag);
  REQUIRE_NOTHROW(prove_coverage(plans));
  // Rank 2 owns pieces 2 and 5, and meets piece 1 in steps 4 and 5, and piece 0 after that.
  RingPlan& plan = plans[2];
  REQUIRE(plan.steps[4].receives.size() == 1);
  REQUIRE(plan.steps[6].receives.size() == 1);
  const BufferId slot = plan.steps[4].receives[0].buffer;
  REQUIRE(plan.steps[6].receives[0].buffer != slot);
  plan.steps[6].receives[0].buffer = slot;
  for (const std::size_t step : {6U, 7U}) { plan.steps[step].work[0].keys.buffer = slot; }
  CHECK_THROWS_AS(prove_coverage(plans), AssertionFailure);
}

TEST_CASE("the proof catches a wait in a turn in which other ranks have not posted") {
  auto plans = plans_of(problem_of(64, 1, 1, false), dense_pattern(64), Schedule::direct, 4);
  REQUIRE_NOTHROW(prove_coverage(plans));
  for (Op& op : plans[2].ops) {
    if (op.kind == OpKind::post && op.step == 3) { op.turn = 4; }  // behind the work of step 1
  }
  std::stable_sort(plans[2].ops.begin(), plans[2].ops.end(), [](const Op& a, const Op& b) { return a.turn < b.turn; });
  REQUIRE_NOTHROW(prove_coverage(plans));
  for (Op& op : plans[2].ops) {
    if (op.turn >= 4 && op.kind != OpKind::finish) { op.turn += 10; }  // which comes last, whatever its number
  }
  CHECK_THROWS_AS(prove_coverage(plans), AssertionFailure);
}

TEST_CASE("direct posts two steps ahead of the work, the rings one") {
  const auto post_of = [](const RingPlan& plan, std::int64_t step) {
    return std::find(plan.ops.begin(), plan.ops.end(),
                     Op{OpKind::post, step, 3 * std::max<std::int64_t>(0, step - steps_ahead(plan.routing.schedule))});
  };
  for (const auto& [schedule, ahead] : {std::pair(Schedule::direct, 2), std::pair(Schedule::ring, 1), std::pair(Schedule::ring_full, 1)}) {
    const RingPlan plan = plans_of(problem_of(80, 1, 1, false), dense_pattern(80), schedule, 5)[3];
    for (std::int64_t step = 1; step < 5; ++step) {
      const auto post = post_of(plan, step);
      REQUIRE(post != plan.ops.end());
      const auto attended = std::count_if(plan.ops.begin(), post, [](const Op& op) { return op.kind == OpKind::attend; });
      CHECK(attended == std::max<std::int64_t>(0, step - ahead));
    }
    CHECK((plan.slot_bytes[2] > 0) == (ahead == 2));
    CHECK(plan.slot_bytes[3] == 0);
  }
}

TEST_CASE("auto balances causal problems that cross shards, and leaves the others contiguous") {
  const auto chosen = [](const Problem& problem, const Pattern& pattern, std::int64_t ranks, PartitionKind partition, Schedule schedule) {
    const Ways ways = choose_ways(problem, pattern, partition, schedule, ranks);
    return std::pair(ways.partition, ways.schedule);
  };
  const Problem causal = problem_of(65536, 4, 4, true);
  const Problem full = problem_of(65536, 4, 4, false);
  const Pattern dense = dense_pattern(65536);
  constexpr PartitionKind kAnyPartition = PartitionKind::automatic;
  constexpr Schedule kAnySchedule = Schedule::automatic;
  CHECK(chosen(causal, dense, 8, kAnyPartition, kAnySchedule) == std::pair(PartitionKind::zigzag, Schedule::direct));
  CHECK(chosen(causal, dense, 8, kAnyPartition, Schedule::ring) == std::pair(PartitionKind::contiguous, Schedule::ring));
  CHECK(chosen(causal, dense, 8, kAnyPartition, Schedule::allgather) == std::pair(PartitionKind::zigzag, Schedule::allgather));
  CHECK(chosen(causal, dense, 8, PartitionKind::contiguous, kAnySchedule) == std::pair(PartitionKind::contiguous, Schedule::ring));
  CHECK(chosen(causal, dense, 1, kAnyPartition, kAnySchedule) == std::pair(PartitionKind::contiguous, Schedule::ring));
  CHECK(chosen(full, dense, 8, kAnyPartition, kAnySchedule) == std::pair(PartitionKind::contiguous, Schedule::ring));
  CHECK(chosen(full, dense, 8, PartitionKind::zigzag, kAnySchedule) == std::pair(PartitionKind::zigzag, Schedule::ring));
  // Segments inside shards are balanced as they are.
  CHECK(chosen(causal, longnet(), 4, kAnyPartition, kAnySchedule) == std::pair(PartitionKind::contiguous, Schedule::ring));
  CHECK_THAT(choose_ways(causal, dense, kAnyPartition, kAnySchedule, 8).reason,
             test::contains_text("1.87 of the mean work with contiguous, 1.00 with zigzag"));
  CHECK(choose_ways(causal, dense, PartitionKind::zigzag, Schedule::ring, 8).reason.empty());
  // Below its own rows a piece is wanted by all ranks above it in one step: too many, when they are many.
  CHECK(chosen(causal, dense, 16, kAnyPartition, kAnySchedule) == std::pair(PartitionKind::zigzag, Schedule::direct));
  CHECK(chosen(causal, dense, 32, kAnyPartition, kAnySchedule) == std::pair(PartitionKind::zigzag, Schedule::ring));
  CHECK_THAT(choose_ways(causal, dense, kAnyPartition, kAnySchedule, 32).reason,
             test::contains_text("with direct the busiest sender of a step would send"));
}

TEST_CASE("the share of the busiest sender is that of the plans' messages") {
  for (std::int64_t number = 0; number < 300; ++number) {
    RandomCase drawn = random_case(8, number, std::nullopt);
    drawn.problem.extra_keys = 0;  // not counted: they go to all ranks under every schedule
    INFO("case " << number << ": " << drawn.describe());
    const std::vector<RingPlan> plans = plans_of(drawn.problem, drawn.pattern, Routing{Schedule::direct}, drawn.ranks, drawn.partition);
    std::vector<double> busiest;
    double all = 0;
    for (const RingPlan& plan : plans) {
      busiest.resize(std::max(busiest.size(), static_cast<std::size_t>(plan.steps.size())), 0);
      for (std::int64_t step = 0; step < std::ssize(plan.steps); ++step) {
        double sent = 0;
        for (const Message& message : plan.steps[step].sends) { sent += static_cast<double>(message.bytes); }
        all += sent;
        double& most = busiest[static_cast<std::size_t>(step)];
        most = std::max(most, sent);
      }
    }
    const double share = all == 0 ? 1.0 : std::accumulate(busiest.begin(), busiest.end(), 0.0) * static_cast<double>(drawn.ranks) / all;
    CHECK(busiest_sender_share(drawn.problem, drawn.pattern, Partition(drawn.partition, drawn.problem.seq_len, drawn.ranks)) ==
          Approx(share));
  }
}

TEST_CASE("pairs of ranks are those of their plans") {
  for (std::int64_t number = 0; number < 300; ++number) {
    const RandomCase drawn = random_case(5, number, std::nullopt);
    INFO("case " << number << ": " << drawn.describe());
    const std::vector<Int128> pairs =
        pairs_of_ranks(drawn.problem, drawn.pattern, Partition(drawn.partition, drawn.problem.seq_len, drawn.ranks));
    const std::vector<RingPlan> plans = plans_of(drawn.problem, drawn.pattern, Routing{drawn.schedule}, drawn.ranks, drawn.partition);
    REQUIRE(pairs.size() == plans.size());
    for (std::size_t rank = 0; rank < plans.size(); ++rank) { REQUIRE(pairs[rank] == plan_cost(plans[rank]).pairs); }
  }
}

TEST_CASE("the parts of an item hold the keys that each batch entry has left, segment by segment") {
  Problem problem = problem_of(40, 1, 1, false);
  problem.batch = 6;
  WorkItem item;
  item.segments = 3;
  item.segment_stride = 12;
  item.k_global = Rows<Global>(Progression{1, 3, 4});  // 1, 4, 7, 10, then 13 to 22 and 25 to 34
  CHECK(parts_of(problem, item) == std::vector<ItemPart>{{0, 6, 0, 3, 4}});

  problem.kv_lengths = {40, 40, 1, 2, 20, 34};

  CHECK(parts_of(problem, item) ==
        std::vector<ItemPart>{{0, 2, 0, 3, 4}, {3, 1, 0, 1, 1}, {4, 1, 0, 1, 4}, {4, 1, 1, 1, 3}, {5, 1, 0, 2, 4}, {5, 1, 2, 1, 3}});
  CHECK(keys_left(problem, item, 2, 0) == 0);
  CHECK(keys_left(problem, item, 4, 1) == 3);
  CHECK(keys_left(problem, item, 4, 2) == 0);
}

TEST_CASE("the proof catches keys of zeros that are forgotten, counted twice or seen by a causal row") {
  Pattern pattern;
  pattern.branches = {{40, 1}, {64, 3}};
  pattern.head_split = HeadSplit::all;
  pattern.ragged = Ragged::zero_keys;
  for (const Routing& routing : {Routing{Schedule::ring}, Routing{Schedule::ring_full}, Routing{Schedule::ring, KeyOrder::cyclic, 8}}) {
    const auto good = plans_of(problem_of(96, 2, 2, false), pattern, routing, 3);
    REQUIRE_NOTHROW(prove_coverage(good));
    bool any = false;
    for (std::size_t rank = 0; rank < good.size(); ++rank) {
      for (std::size_t number = 0; number < good[rank].steps[0].work.size(); ++number) {
        if (good[rank].steps[0].work[number].zero_keys == 0) { continue; }
        any = true;
        auto forgotten = good;
        forgotten[rank].steps[0].work[number].zero_keys = 0;
        CHECK_THROWS_AS(prove_coverage(forgotten), AssertionFailure);
        auto one_more = good;
        ++one_more[rank].steps[0].work[number].zero_keys;
        CHECK_THROWS_AS(prove_coverage(one_more), AssertionFailure);
      }
    }
    CHECK(any);
    auto elsewhere = good;
    for (Step& step : elsewhere[0].steps) {
      for (WorkItem& item : step.work) { item.zero_keys += item.keys.block >= 0 ? 1 : 0; }
    }
    CHECK_THROWS_AS(prove_coverage(elsewhere), AssertionFailure);
    const auto causal = plans_of(problem_of(96, 2, 2, true), pattern, routing, 3);
    REQUIRE_NOTHROW(prove_coverage(causal));
    for (const RingPlan& plan : causal) {
      for (const WorkItem& item : plan.steps[0].work) { CHECK(item.zero_keys == 0); }
    }
  }
}

TEST_CASE("extra keys come from rank 0 in the first message to every rank that has queries, and are met there and then") {
  Pattern pattern;
  pattern.branches = {{8, 1}, {24, 3}};
  pattern.head_split = HeadSplit::all;
  Problem problem = problem_of(24, 4, 2, true);
  problem.extra_keys = 5;
  const std::int64_t bytes = 2 * 5 * 2 * 128 * 2;
  for (const Routing& routing : {Routing{Schedule::ring}, Routing{Schedule::direct, KeyOrder::cyclic, 8}}) {
    // Branch 0 sends nothing. Ranks 24 to 29 have no rows.
    const std::vector<RingPlan> plans = plans_of(problem, pattern, routing, 30);
    REQUIRE_NOTHROW(prove_coverage(plans));
    for (const RingPlan& plan : plans) {
      CHECK(buffer_bytes(plan, BufferId::extra) == (plan.rank == 0 ? bytes : 0));
      CHECK(plan.extra_partial == (routing.key_order == KeyOrder::cyclic ? 2 : -1));
      CHECK(plan.partials == (routing.key_order == KeyOrder::cyclic ? 3 : 1));
      if (plan.rank == 0) {
        CHECK(plan.steps[1].sends.size() == 23);
      } else if (plan.local_rows > 0) {
        REQUIRE_FALSE(plan.steps[1].receives.empty());
        CHECK(plan.steps[1].receives[0].peer == 0);
        CHECK(plan.steps[1].receives[0].bytes >= bytes);
      } else {
        CHECK(plan.steps.size() == 1);
        continue;
      }
      const WorkItem& last = plan.steps[plan.rank == 0 ? 0 : 1].work.back();
      CHECK((problem.is_extra(last.k_global[0]) || routing.key_order == KeyOrder::cyclic));
    }
  }
  problem.extra_keys = 0;
  CHECK(plans_of(problem, dense_pattern(24), Routing{Schedule::ring, KeyOrder::cyclic, 8}, 3)[0].partials == 1);
}

TEST_CASE("the proof catches extra keys that are forgotten, met twice, or met in a partial of others") {
  Problem problem = problem_of(96, 2, 2, false);
  problem.extra_keys = 3;
  for (const Routing& routing : {Routing{Schedule::ring}, Routing{Schedule::ring_full}, Routing{Schedule::ring, KeyOrder::cyclic, 8}}) {
    const auto good = plans_of(problem, dense_pattern(96), routing, 3);
    REQUIRE_NOTHROW(prove_coverage(good));
    for (std::size_t rank = 0; rank < good.size(); ++rank) {
      for (std::int64_t step = 0; step < std::ssize(good[rank].steps); ++step) {
        const std::vector<WorkItem>& work = good[rank].steps[step].work;
        const auto item = std::find_if(work.begin(), work.end(), [&](const WorkItem& each) { return problem.is_extra(each.k_global[0]); });
        CHECK((item != work.end()) == (step == (rank == 0 ? 0 : 1)));
        if (item == work.end()) { continue; }
        auto forgotten = good;
        forgotten[rank].steps[step].work.erase(forgotten[rank].steps[step].work.begin() + (item - work.begin()));
        CHECK_THROWS_AS(prove_coverage(forgotten), AssertionFailure);
        auto twice = good;
        twice[rank].steps[step].work.push_back(*item);
        ++twice[rank].steps[step].work.back().wave;
        CHECK_THROWS_AS(prove_coverage(twice), AssertionFailure);
        auto masked = good;
        masked[rank].steps[step].work[static_cast<std::size_t>(item - work.begin())].mask = kernels::Mask::causal;
        CHECK_THROWS_AS(prove_coverage(masked), AssertionFailure);
        if (routing.key_order != KeyOrder::cyclic) { continue; }
        auto mixed = good;
        mixed[rank].steps[step].work[static_cast<std::size_t>(item - work.begin())].partial = 0;
        CHECK_THROWS_AS(prove_coverage(mixed), AssertionFailure);
      }
    }
  }
}

TEST_CASE("each branch has a partial of its own under a cyclic order, and all branches of a step are one wave") {
  Pattern pattern;
  pattern.branches = {{16, 1}, {64, 2}, {96, 3}};
  pattern.head_split = HeadSplit::all;
  for (const RingPlan& plan : plans_of(problem_of(96, 2, 2, true), pattern, Routing{Schedule::ring, KeyOrder::cyclic, 8}, 3)) {
    CHECK(plan.partials == 3);
    for (const Step& step : plan.steps) {
      for (const WorkItem& item : step.work) { CHECK((item.wave == 0 && item.partial == item.branch)); }
    }
  }
}

TEST_CASE("the order of keys is said, with what keeps its promise where a shard cuts a block") {
  const Routing cyclic{Schedule::ring, KeyOrder::cyclic, 256};
  const auto said = [&](std::int64_t seq_len, const Pattern& pattern, std::int64_t ranks, const Routing& routing) {
    return describe_key_order(problem_of(seq_len, 2, 2, false), pattern, Partition(PartitionKind::contiguous, seq_len, ranks), routing);
  };
  CHECK_THAT(said(2048, dense_pattern(2048), 8, cyclic), test::contains_text("the same bits as on any ranks"));
  CHECK_THAT(said(2049, dense_pattern(2049), 1, cyclic), test::contains_text("the same bits as on any ranks"));
  CHECK_THAT(said(2048, dense_pattern(2048), 8, Routing{}), test::contains_text("as they come"));
  const std::string cut = said(2048, dense_pattern(2048), 3, cyclic);
  CHECK_THAT(cut, test::contains_text("rank 0 ends inside a block of 256 rows of branch 0"));
  CHECK_THAT(cut, test::contains_text("it would be with --seq-len 1536 or 2304, or on 2 or 4 ranks"));
  Pattern dilated;
  dilated.branches = {{512, 1}, {2048, 2}};
  CHECK_THAT(said(2048, dilated, 4, cyclic), test::contains_text("the same bits as on any ranks"));
  CHECK_THAT(said(2048, dilated, 8, cyclic), test::contains_text("of branch 1"));
  // Segments inside shards are whole, but all rows meet the extra keys together.
  Problem extra = problem_of(768, 2, 2, false);
  Pattern inside;
  inside.branches = {{128, 1}};
  const Partition halves(PartitionKind::contiguous, 768, 2);
  CHECK_THAT(describe_key_order(extra, inside, halves, cyclic), test::contains_text("the same bits as on any ranks"));
  extra.extra_keys = 1;
  CHECK_THAT(describe_key_order(extra, inside, halves, cyclic),
             test::contains_text("rank 0 ends inside a block of 256 rows of the sequence, which meets the extra keys") &&
                 test::contains_text("with --seq-len 512 or 1024"));
}

TEST_CASE("an order of keys without blocks is no routing") {
  const Partition partition(PartitionKind::contiguous, 8, 2);
  CHECK_THROWS_AS(make_plan(problem_of(8, 1, 1, false), dense_pattern(8), partition, {Schedule::ring, KeyOrder::cyclic, 0}, 0),
                  InvalidArgument);
  CHECK_THROWS_AS(make_plan(problem_of(8, 1, 1, false), dense_pattern(8), partition, {Schedule::ring, KeyOrder::automatic, 8}, 0),
                  InvalidArgument);
}

namespace {

std::vector<PlanFigures> figures_of_ranks(const Problem& problem, const Pattern& pattern, const Partition& partition,
                                          const Routing& routing) {
  std::vector<PlanFigures> all;
  for_figures_of_ranks(problem, pattern, partition, routing, [&](const PlanFigures& figures) { all.push_back(figures); });
  return all;
}

}  // namespace

TEST_CASE("the figures of all ranks without their plans are those of the plans") {
  const std::uint64_t seed = 31;
  INFO("seed " << seed);
  std::int64_t moved = 0;
  for (std::int64_t number = 0; number < 3000; ++number) {
    const RandomCase drawn = random_case(seed, number, std::nullopt);
    constexpr std::array kSchedules{Schedule::ring, Schedule::ring_full, Schedule::direct, Schedule::direct, Schedule::allgather};
    const Schedule schedule = kSchedules[static_cast<std::size_t>(number) % kSchedules.size()];
    constexpr std::array kPartitions{PartitionKind::contiguous, PartitionKind::zigzag, PartitionKind::striped};
    const PartitionKind kind = kPartitions[static_cast<std::size_t>(number / 5) % kPartitions.size()];
    const bool ordered = number % 3 != 0 && keeps_key_order(kind, schedule, drawn.problem.causal);
    const Routing routing = ordered ? Routing{schedule, KeyOrder::cyclic, 16} : Routing{schedule};
    INFO("case " << number << ": " << drawn.describe() << ", " << to_string(schedule) << ", " << to_string(kind));
    const Partition partition(kind, drawn.problem.seq_len, drawn.ranks);
    const std::vector<PlanFigures> figures = figures_of_ranks(drawn.problem, drawn.pattern, partition, routing);
    const std::vector<RingPlan> plans = plans_of(drawn.problem, drawn.pattern, routing, drawn.ranks, kind);
    REQUIRE(figures.size() == plans.size());
    for (std::size_t rank = 0; rank < plans.size(); ++rank) {
      INFO("rank " << rank);
      const PlanCost cost = plan_cost(plans[rank]);
      REQUIRE(figures[rank].sizes == sizes_of(plans[rank]));
      REQUIRE(figures[rank].cost.pairs == cost.pairs);
      REQUIRE(figures[rank].cost.steps == cost.steps);
      REQUIRE(figures[rank].cost.messages_sent == cost.messages_sent);
      REQUIRE(figures[rank].cost == cost);
      moved += cost.messages_sent;
    }
  }
  CHECK(moved > 10000);
}

TEST_CASE("the figures of long rings and of whole segments with other heads are those of the plans") {
  Pattern pattern;
  pattern.branches = {{64, 1}, {1000, 3}, {4096, 7}, {4099, 1}};
  pattern.offset = OffsetRule::head;
  for (const HeadSplit split : {HeadSplit::all, HeadSplit::first}) {
    pattern.head_split = split;
    for (const bool causal : {false, true}) {
      const Problem problem = problem_of(4099, 6, 3, causal);
      const std::vector<RingPlan> plans = plans_of(problem, pattern, Schedule::ring, 37);
      const std::vector<PlanFigures> figures =
          figures_of_ranks(problem, pattern, Partition(PartitionKind::contiguous, 4099, 37), Routing{Schedule::ring});
      for (std::size_t rank = 0; rank < plans.size(); ++rank) {
        INFO("rank " << rank);
        REQUIRE(figures[rank].sizes == sizes_of(plans[rank]));
        REQUIRE(figures[rank].cost == plan_cost(plans[rank]));
      }
    }
  }
}

TEST_CASE("the figures of 4,096 ranks of a dense causal ring take seconds at most, and are in proportion") {
  const std::int64_t ranks = 4096;
  const std::int64_t seq_len = std::int64_t{1} << 30;
  const Problem problem = problem_of(seq_len, 1, 1, true);
  const auto began = std::chrono::steady_clock::now();

  const std::vector<PlanFigures> figures =
      figures_of_ranks(problem, dense_pattern(seq_len), Partition(PartitionKind::contiguous, seq_len, ranks),
                       Routing{Schedule::ring, KeyOrder::cyclic, 256});

  // A third of a second on an idle machine.
  CHECK(std::chrono::steady_clock::now() - began < std::chrono::seconds(5));
  REQUIRE(std::ssize(figures) == ranks);
  Int128 pairs = 0;
  Int128 sent = 0;
  for (const PlanFigures& rank : figures) {
    pairs += rank.cost.pairs;
    sent += rank.cost.bytes_sent;
  }
  CHECK(pairs == static_cast<Int128>(seq_len) * (seq_len + 1) / 2);
  CHECK(sent == static_cast<Int128>(ranks) * (ranks - 1) / 2 * (seq_len / ranks) * 2 * 128 * 2);
  CHECK(figures.back().cost.steps == ranks);
  CHECK(figures.front().cost.steps == 2);
}

TEST_CASE("the figures of 1,024 ranks of a causal zigzag under direct take a second, and are in proportion") {
  const std::int64_t ranks = 1024;
  const std::int64_t seq_len = std::int64_t{1} << 28;
  const Problem problem = problem_of(seq_len, 1, 1, true);
  const auto began = std::chrono::steady_clock::now();

  const std::vector<PlanFigures> figures = figures_of_ranks(
      problem, dense_pattern(seq_len), Partition(PartitionKind::zigzag, seq_len, ranks), Routing{Schedule::direct, KeyOrder::cyclic, 256});

  // A tenth of a second on an idle machine.
  CHECK(std::chrono::steady_clock::now() - began < std::chrono::seconds(2));
  const std::int64_t piece_bytes = seq_len / ranks / 2 * 2 * 128 * 2;
  Int128 sent = 0;
  Int128 received = 0;
  for (const PlanFigures& rank : figures) {
    sent += rank.cost.bytes_sent;
    received += rank.cost.bytes_received;
    REQUIRE(rank.cost.steps == 2 * ranks);
  }
  CHECK(sent == received);
  // Rank i needs the 2P - 1 - i pieces before its upper one but its own lower one.
  CHECK(sent == static_cast<Int128>(ranks) * (3 * ranks - 3) / 2 * piece_bytes);
}

TEST_CASE("a step of a causal ring of zigzag brings the pieces of one other rank") {
  const std::int64_t ranks = 12;
  const std::int64_t seq_len = 240;
  const Problem problem = problem_of(seq_len, 1, 1, true);
  const std::vector<RingPlan> plans = plans_of(problem, dense_pattern(seq_len), Routing{Schedule::ring}, ranks, PartitionKind::zigzag);
  const std::int64_t piece_bytes = block_bytes(problem, seq_len / ranks / 2, 1);
  for (const RingPlan& plan : plans) {
    INFO("rank " << plan.rank);
    REQUIRE(std::ssize(plan.steps) == ranks);
    for (std::int64_t step = 1; step < ranks; ++step) {
      const std::int64_t owner = (plan.rank - step + ranks) % ranks;
      // The lower piece comes before all queries of upper ones; the upper piece of an earlier rank comes after them.
      std::int64_t bytes = 0;
      for (const Message& message : plan.steps[step].receives) {
        bytes += message.bytes;
        for (const std::int64_t block : message.blocks) { CHECK(plan.blocks[block].owner == owner); }
      }
      CHECK(bytes == (owner > plan.rank ? 2 : 1) * piece_bytes);
    }
    CHECK(*std::max_element(plan.slot_bytes.begin(), plan.slot_bytes.end()) <= 2 * piece_bytes);
  }
}

TEST_CASE("equal arguments give equal plans") {
  Pattern pattern = longnet();
  pattern.head_split = HeadSplit::all;
  const Problem problem = problem_of(65536, 4, 2, true);
  CHECK(plans_of(problem, pattern, Schedule::ring, 8) == plans_of(problem, pattern, Schedule::ring, 8));
  CHECK_FALSE(plans_of(problem, pattern, Schedule::ring, 8) == plans_of(problem, pattern, Schedule::ring_full, 8));
}

TEST_CASE("counts of a sequence of 2^30 tokens do not overflow: pairs, FLOPs and bytes over all ranks") {
  Problem problem = problem_of(std::int64_t{1} << 30, 16, 16, false);
  problem.head_dim = 64;
  const Pattern dense = dense_pattern(problem.seq_len);

  const PlanCost one = plan_cost(plans_of(problem, dense, Schedule::ring, 1).front());
  CHECK(one.pairs == Int128{1} << 64);
  CHECK(is_near(one.flops, 4.0 * 64 * 0x1p64));

  double flops = 0;
  for (const RingPlan& plan : plans_of(problem, dense, Schedule::ring, 2)) { flops += plan_cost(plan).flops; }
  CHECK(is_near(flops, 4.0 * 64 * 0x1p64));

  problem.causal = true;
  problem.heads = problem.kv_heads = 32;
  const PlanCost causal = plan_cost(plans_of(problem, dense, Schedule::ring, 1).front());
  CHECK(causal.pairs == Int128{32} * ((Int128{1} << 59) + (Int128{1} << 29)));
}

TEST_CASE("bytes over all ranks pass 2^63 where every rank sends less") {
  Problem problem = problem_of(std::int64_t{1} << 44, 16, 16, false);
  problem.head_dim = 256;  // K and V of the whole: 2^57 bytes, passed 127 times

  Int128 sent = 0;
  for (const RingPlan& plan : plans_of(problem, dense_pattern(problem.seq_len), Schedule::ring_full, 128)) {
    sent += plan_cost(plan).bytes_sent;
  }

  CHECK(sent == (Int128{127} << 58));
}

TEST_CASE("a memory or a message beyond 2^60 bytes is refused and does not come out small") {
  Problem problem = problem_of(std::int64_t{1} << 46, 16, 16, false);
  problem.head_dim = 256;
  Pattern pattern;
  pattern.branches.assign(64, {problem.seq_len, 1});
  pattern.head_split = HeadSplit::all;
  pattern.mixing = Mixing::sum;

  const RingPlan plan = plans_of(problem, pattern, Schedule::ring, 1).front();
  CHECK_THROWS_AS(plan_memory(plan.problem, sizes_of(plan), whole_partials_bytes(plan.problem, sizes_of(plan), 8)), InvalidArgument);
  CHECK_THROWS_AS(plans_of(problem, pattern, Schedule::ring, 2), InvalidArgument);
}
