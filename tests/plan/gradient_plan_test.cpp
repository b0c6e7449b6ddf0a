// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/coverage.hpp>
#include <annulus/plan/plan.hpp>
#include <annulus/verify/random_problem.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <utility>
#include <vector>

using namespace annulus;

namespace {

Routing with_gradients(Routing routing) {
  routing.gradients = true;
  return routing;
}

std::vector<RingPlan> plans_of(const Problem& problem, const Pattern& pattern, const Routing& routing, std::int64_t ranks,
                               PartitionKind kind = PartitionKind::contiguous) {
  const Partition partition(kind, problem.seq_len, ranks);
  std::vector<RingPlan> plans;
  for (std::int64_t rank = 0; rank < ranks; ++rank) { plans.push_back(make_plan(problem, pattern, partition, routing, rank)); }
  return plans;
}

std::vector<RingPlan> dense_ring(std::int64_t seq_len, std::int64_t ranks, bool causal = false) {
  Problem problem;
  problem.seq_len = seq_len;
  problem.heads = 2;
  problem.kv_heads = 1;
  problem.dtype = DType::bf16;
  problem.causal = causal;
  return plans_of(problem, dense_pattern(seq_len), with_gradients({Schedule::ring}), ranks);
}

/// The first step of a rank's backward pass with a sum, and its last.
Step& first_with_sums(RingPlan& plan) {
  return *std::find_if(plan.steps.begin(), plan.steps.end(), [](const Step& step) { return !step.sums.empty(); });
}

}  // namespace

TEST_CASE("gradients of random problems: every pair gives to them once, and every dK and dV comes home once") {
  const std::uint64_t seed = 17;
  INFO("seed " << seed);
  int proven = 0;
  for (std::int64_t number = 0; number < 900; ++number) {
    RandomCase drawn = random_case(seed, number, std::nullopt);
    drawn.problem.extra_keys = 0;
    // The proof costs seq_len^2 * heads * branches.
    if (drawn.problem.seq_len * drawn.problem.seq_len * drawn.problem.heads * std::ssize(drawn.pattern.branches) > 300000) { continue; }
    ++proven;
    INFO("case " << number << ": " << drawn.describe());
    const std::vector<std::pair<PartitionKind, Routing>> ways{
        {PartitionKind::contiguous, {Schedule::ring}},
        {PartitionKind::contiguous, {Schedule::ring, KeyOrder::cyclic, 4}},
        {PartitionKind::contiguous, {Schedule::ring, KeyOrder::arrival, 0, TileOrder::hilbert}},
        {PartitionKind::contiguous, {Schedule::ring_full, KeyOrder::cyclic, 8}},
        {PartitionKind::contiguous, {Schedule::direct, KeyOrder::cyclic, 4}},
        {PartitionKind::contiguous, {Schedule::allgather}},
        {PartitionKind::zigzag, {Schedule::ring}},
        {PartitionKind::zigzag, {Schedule::ring_full}},
        {PartitionKind::zigzag, {Schedule::direct}},
        {PartitionKind::zigzag, drawn.problem.causal ? Routing{Schedule::allgather, KeyOrder::cyclic, 2} : Routing{Schedule::allgather}},
        {PartitionKind::striped, {Schedule::ring}},
        {PartitionKind::striped, {Schedule::ring_full}},
        {PartitionKind::striped, {Schedule::direct}},
        {PartitionKind::striped, {Schedule::allgather}},
    };
    for (const auto& [partition, routing] : ways) {
      const std::vector<RingPlan> plans = plans_of(drawn.problem, drawn.pattern, with_gradients(routing), drawn.ranks, partition);
      const Coverage coverage = prove_coverage(plans);
      REQUIRE(coverage.gradient_pairs == coverage.pairs);
      Int128 pairs = 0;
      for (const RingPlan& plan : plans) {
        pairs += plan_cost(plan).gradient_pairs;
        REQUIRE(plan.forward_steps == plans.front().forward_steps);
      }
      REQUIRE(pairs == coverage.gradient_pairs);
    }
  }
  CHECK(proven > 300);
}

TEST_CASE("the forward pass of a plan with gradients is that of one without") {
  RandomCase drawn = random_case(5, 3, 4);
  drawn.problem.extra_keys = 0;
  const Partition partition(PartitionKind::contiguous, drawn.problem.seq_len, 4);
  for (const Schedule schedule : {Schedule::ring, Schedule::direct}) {
    const RingPlan forward = make_plan(drawn.problem, drawn.pattern, partition, {schedule}, 2);
    const RingPlan both = make_plan(drawn.problem, drawn.pattern, partition, with_gradients({schedule}), 2);

    for (std::int64_t step = 0; step < std::ssize(forward.steps); ++step) { CHECK(forward.steps[step] == both.steps[step]); }
  }
}

TEST_CASE("a dense ring moves K and V twice, and dK and dV in fp32 as often") {
  for (const std::int64_t ranks : {1, 2, 5}) {
    const std::int64_t rows = 40 / ranks;
    for (const RingPlan& plan : dense_ring(40, ranks)) {
      const Int128 block = block_bytes(plan.problem, rows, 1);

      const PlanCost cost = plan_cost(plan);

      CHECK(cost.bytes_received == (ranks - 1) * (2 * block + 2 * block));  // fp32 is twice bf16
      CHECK(cost.bytes_sent == cost.bytes_received);
      CHECK(cost.flops == 3.5 * 4.0 * 64 * static_cast<double>(cost.pairs));
      if (ranks == 1) { continue; }
      // The work of every step, and two steps more in which the last contribution goes home.
      CHECK(std::ssize(plan.steps) == plan.forward_steps + ranks + 2);
    }
  }
}

TEST_CASE("only the rows and heads of a block travel home") {
  Problem problem;
  problem.seq_len = 64;
  problem.heads = 4;
  problem.kv_heads = 4;
  Pattern pattern;
  pattern.branches = {{64, 4}};
  pattern.offset = OffsetRule::head;
  for (const RingPlan& plan : plans_of(problem, pattern, with_gradients({Schedule::ring}), 2)) {
    for (const Step& step : plan.steps) {
      for (const Message& message : step.receives) {
        for (const std::int64_t index : message.gradients) { CHECK(plan.blocks[index].rows_global.count() == 8); }
      }
    }
    // 4 heads of 8 rows each instead of 32.
    CHECK(plan_cost(plan).bytes_received == 3 * block_bytes(problem, 8, 4));
  }
}

TEST_CASE("the proof catches gradients that go astray") {
  const std::vector<RingPlan> good = dense_ring(24, 4);
  REQUIRE_NOTHROW(prove_coverage(good));

  auto lost = good;
  first_with_sums(lost[1]).sums.clear();
  CHECK_THROWS_AS(prove_coverage(lost), AssertionFailure);

  auto twice = good;
  Step& step = first_with_sums(twice[1]);
  step.sums.push_back(step.sums.front());
  CHECK_THROWS_AS(prove_coverage(twice), AssertionFailure);

  auto other_rows = good;
  for (Step& each : other_rows[2].steps) {
    for (SumItem& sum : each.sums) {
      if (sum.to == BufferId::own_gradient) { sum.to_rows = Rows<Local>(range(0, 5)); }
    }
  }
  CHECK_THROWS_AS(prove_coverage(other_rows), AssertionFailure);

  auto never_cleared = good;
  never_cleared[3].steps[never_cleared[3].forward_steps + 1].contributions.clear();
  CHECK_THROWS_AS(prove_coverage(never_cleared), AssertionFailure);

  auto to_others = good;
  for (Step& each : to_others[0].steps) {
    for (WorkItem& item : each.work) {
      if (item.gradient.buffer == BufferId::send_0) { item.gradient.buffer = BufferId::send_1; }
    }
  }
  CHECK_THROWS_AS(prove_coverage(to_others), AssertionFailure);

  auto not_met = good;
  not_met[0].steps[not_met[0].forward_steps + 2].work.clear();
  CHECK_THROWS_AS(prove_coverage(not_met), AssertionFailure);
}

TEST_CASE("the proof catches ops of the backward pass that are missing, repeated or out of order") {
  const std::vector<RingPlan> good = dense_ring(24, 3);
  for (std::size_t index = 0; index < good[1].ops.size(); ++index) {
    auto missing = good;
    missing[1].ops.erase(missing[1].ops.begin() + static_cast<std::ptrdiff_t>(index));
    CHECK_THROWS_AS(prove_coverage(missing), AssertionFailure);
    auto repeated = good;
    repeated[1].ops.insert(repeated[1].ops.begin() + static_cast<std::ptrdiff_t>(index), good[1].ops[index]);
    CHECK_THROWS_AS(prove_coverage(repeated), AssertionFailure);
  }
}

TEST_CASE("the proof catches two items of a wave that add to the same dK and dV") {
  Problem problem;
  problem.seq_len = 32;
  problem.heads = 1;
  problem.kv_heads = 1;
  const std::vector<RingPlan> good = plans_of(problem, dense_pattern(32), with_gradients({Schedule::ring}), 2, PartitionKind::zigzag);
  REQUIRE_NOTHROW(prove_coverage(good));
  auto together = good;
  for (WorkItem& item : together[0].steps[together[0].forward_steps].work) { item.wave = 0; }
  CHECK_THROWS_AS(prove_coverage(together), AssertionFailure);
}
