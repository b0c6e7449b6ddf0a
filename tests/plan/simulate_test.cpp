// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/simulate.hpp>

#include <annulus/core/error.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/predict.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <vector>

using namespace annulus;

namespace {

constexpr std::int64_t kHeadDim = 16;
constexpr double kUnitMs = 1.0;

Problem problem_of(std::int64_t seq_len, bool causal) {
  Problem problem;
  problem.seq_len = seq_len;
  problem.heads = 1;
  problem.kv_heads = 1;
  problem.head_dim = kHeadDim;
  problem.dtype = DType::bf16;
  problem.causal = causal;
  return problem;
}

Pattern dense(std::int64_t seq_len) {
  Pattern pattern;
  pattern.branches = {{seq_len, 1}};
  return pattern;
}

std::vector<RingPlan> plans_of(const Problem& problem, PartitionKind kind, const Routing& routing, std::int64_t ranks) {
  const Partition partition(kind, problem.seq_len, ranks);
  std::vector<RingPlan> plans;
  for (std::int64_t rank = 0; rank < ranks; ++rank) {
    plans.push_back(make_plan(problem, dense(problem.seq_len), partition, routing, rank));
  }
  return plans;
}

/// A machine on which `rows` queries attend as many keys in kUnitMs, whose K and V take `transfer` of that from rank to rank, and whose
/// copies cost nothing to speak of.
Machine machine_of(std::int64_t rows, double transfer) {
  Machine machine;
  machine.name = "units";
  machine.ranks_per_host = std::numeric_limits<std::int64_t>::max();
  machine.copy = TransferTable({{std::int64_t{1} << 40, 1e-9}});
  machine.link_inside = TransferTable({{2 * rows * kHeadDim * 2, 1e3 * kUnitMs * transfer}});
  const double flops = 4.0 * static_cast<double>(kHeadDim) * static_cast<double>(rows * rows);
  machine.block_rates = {{DType::bf16, kHeadDim, kernels::Mask::none, 1, {{1, flops / (kUnitMs * 1e-3) / 1e9}}}};
  return machine;
}

double mean_units(const std::vector<RingPlan>& plans, std::int64_t rows) {
  double pairs = 0;
  for (const RingPlan& plan : plans) { pairs += static_cast<double>(plan_cost(plan).pairs); }
  return pairs / static_cast<double>(rows * rows) / static_cast<double>(plans.size());
}

/// The same plans, whose ranks post a step's messages when they come to the step.
std::vector<RingPlan> posted_late(std::vector<RingPlan> plans) {
  for (RingPlan& plan : plans) {
    std::vector<Op> ops;
    for (const Op& op : plan.ops) {
      if (op.kind == OpKind::pack || op.kind == OpKind::post) { continue; }
      if (op.kind == OpKind::wait) {
        ops.push_back({OpKind::pack, op.step, op.turn});
        ops.push_back({OpKind::post, op.step, op.turn});
      }
      ops.push_back(op);
    }
    plan.ops = std::move(ops);
  }
  return plans;
}

}  // namespace

TEST_CASE("on a clock with transfers of a tenth of a unit, direct keeps causal zigzag at work and a causal ring waits for its last rank") {
  for (const std::int64_t ranks : {4, 8, 16}) {
    const std::int64_t piece = 64;
    const Problem problem = problem_of(ranks * 2 * piece, true);
    const Machine machine = machine_of(piece, 0.1);
    const std::vector<RingPlan> balanced = plans_of(problem, PartitionKind::zigzag, Routing{Schedule::direct, KeyOrder::cyclic, 8}, ranks);
    const std::vector<RingPlan> ring = plans_of(problem, PartitionKind::contiguous, Routing{Schedule::ring, KeyOrder::cyclic, 8}, ranks);
    const double mean = mean_units(ring, piece) * kUnitMs;

    const double with_direct = simulate(balanced, machine).total_ms;
    const double with_ring = simulate(ring, machine).total_ms;
    const double late = simulate(posted_late(balanced), machine).total_ms;

    INFO(ranks << " ranks: " << mean / with_direct << " of the work with direct, " << mean / late << " if sends wait for their step, "
               << mean / with_ring << " with the ring");
    CHECK(mean / with_direct > 0.97);
    CHECK(mean / with_ring < 0.6);
    if (ranks == 8) { CHECK(mean / late < 0.85); }
    if (ranks == 16) { CHECK(mean / late < 0.75); }
  }
}

TEST_CASE("a ring of two takes the work of two blocks, or what its transfers leave of the second") {
  const std::int64_t rows = 64;
  const std::vector<RingPlan> plans = plans_of(problem_of(2 * rows, false), PartitionKind::contiguous, Routing{Schedule::ring}, 2);

  const Simulation hidden = simulate(plans, machine_of(rows, 0.5));
  const Simulation exposed = simulate(plans, machine_of(rows, 3.0));
  Machine waits = machine_of(rows, 0.5);
  waits.transfers = Transfers::in_wait;
  const Simulation in_wait = simulate(plans, waits);

  CHECK(hidden.total_ms == Approx(2 * kUnitMs));
  CHECK(exposed.total_ms == Approx(4 * kUnitMs));
  CHECK(in_wait.total_ms == Approx(2.5 * kUnitMs));
  for (const std::vector<StepTiming>& of_rank : exposed.timings) {
    REQUIRE(of_rank.size() == 2);
    CHECK(of_rank[0].compute_ms == Approx(kUnitMs));
    CHECK(of_rank[1].exposed_ms == Approx(2 * kUnitMs));
    CHECK(of_rank[1].communication_ms == Approx(3 * kUnitMs));
    CHECK(of_rank[1].work_begin_ms == Approx(3 * kUnitMs));
    CHECK(of_rank[1].transfer_begin_ms == Approx(0).margin(1e-9));
    CHECK(of_rank[1].bytes_sent == 2 * rows * kHeadDim * 2);
    CHECK(of_rank[1].bytes_received == 2 * rows * kHeadDim * 2);
  }
}

TEST_CASE("virtual ranks take turns on one clock, and copies that can go on beside it do") {
  const std::int64_t rows = 64;
  const std::int64_t ranks = 4;
  const std::vector<RingPlan> plans = plans_of(problem_of(ranks * rows, false), PartitionKind::contiguous, Routing{Schedule::ring}, ranks);
  Machine machine = machine_of(rows, 1.0);
  machine.copy = machine.link_inside;
  const double partials_ms = simulate_virtual_ranks(plans, machine).total_ms;
  machine.transfers = Transfers::in_wait;
  const double in_turn_ms = simulate_virtual_ranks(plans, machine).total_ms;

  // 16 blocks of work, 12 messages of a unit each, and what making partials and results of them takes.
  CHECK(in_turn_ms - partials_ms == Approx(12 * kUnitMs));
  CHECK(partials_ms > 16 * kUnitMs);
}

TEST_CASE("a wave costs a launch gap, and as long as the lanes that have a tile more than others") {
  const std::int64_t rows = 64;
  const std::vector<RingPlan> plans = plans_of(problem_of(rows, false), PartitionKind::contiguous, Routing{Schedule::ring}, 1);
  Machine machine = machine_of(rows, 1.0);
  machine.launch_gap_us = 250;
  machine.tile_rows = 32;
  machine.lanes = 2;
  CHECK(simulate(plans, machine).total_ms == Approx(1.25 * kUnitMs));
  machine.lanes = 3;  // two tiles keep two of three lanes busy
  CHECK(simulate(plans, machine).total_ms == Approx(1.75 * kUnitMs));
}

TEST_CASE("rows that lie next to each other in a shard are attended at the rate of such, however far apart they are in the sequence") {
  const std::int64_t rows = 64;
  std::vector<RingPlan> plans = plans_of(problem_of(4 * rows, false), PartitionKind::contiguous, Routing{Schedule::ring}, 1);
  Machine machine = machine_of(rows, 0.5);
  machine.block_rates.push_back(machine.block_rates.front());
  machine.block_rates.back().dilation_rate = 4;
  for (BlockRates::Rate& rate : machine.block_rates.back().rates) { rate.gflops /= 2; }
  REQUIRE(plans[0].steps[0].work.size() == 1);
  WorkItem& item = plans[0].steps[0].work[0];

  item.q_global = item.k_global = Rows<Global>({0, 4, rows});
  item.q_local = Rows<Local>({0, 1, rows});
  CHECK(simulate(plans, machine).total_ms == Approx(kUnitMs));
  item.q_local = Rows<Local>({0, 4, rows});
  CHECK(simulate(plans, machine).total_ms == Approx(2 * kUnitMs));
}

TEST_CASE("partials take what the machine's times of them say") {
  const std::int64_t rows = 64;
  const std::vector<RingPlan> plans = plans_of(problem_of(rows, false), PartitionKind::contiguous, Routing{Schedule::ring}, 1);
  Machine machine = machine_of(rows, 1.0);
  machine.partials = TransferTable({{rows * (kHeadDim + 2) * 4, 3e3 * kUnitMs}});
  CHECK(simulate(plans, machine).total_ms == Approx(4 * kUnitMs));
}

TEST_CASE("ranks of two hosts use the link between them, and a machine of one host refuses them") {
  const std::int64_t rows = 64;
  const std::vector<RingPlan> plans = plans_of(problem_of(2 * rows, false), PartitionKind::contiguous, Routing{Schedule::ring}, 2);
  Machine machine = machine_of(rows, 0.5);
  machine.ranks_per_host = 1;

  CHECK_THROWS_AS(simulate(plans, machine), InvalidArgument);
  machine.link_between = TransferTable({{2 * rows * kHeadDim * 2, 5e3 * kUnitMs}});
  CHECK(simulate(plans, machine).total_ms == Approx(6 * kUnitMs));
  machine.ranks_per_host = 2;
  CHECK(simulate(plans, machine).total_ms == Approx(2 * kUnitMs));
}

TEST_CASE("rates and times between those of a machine are between them") {
  Machine machine = machine_of(64, 0.5);
  machine.block_rates = {{DType::bf16, 64, kernels::Mask::none, 1, {{64, 10.0}, {256, 30.0}}},
                         {DType::bf16, 128, kernels::Mask::none, 1, {{64, 20.0}}},
                         {DType::bf16, 128, kernels::Mask::none, 4, {{64, 15.0}}}};
  const auto rate = [&](std::int64_t head_dim, double rows) {
    return machine.flops_per_s(DType::bf16, head_dim, kernels::Mask::causal, 1, rows) / 1e9;
  };
  CHECK(rate(64, 64) == Approx(10));
  CHECK(rate(64, 128) == Approx(20));
  CHECK(rate(64, 1e6) == Approx(30));
  CHECK(rate(64, 16) == Approx(2.5));
  CHECK(rate(120, 64) == Approx(20));
  CHECK(machine.flops_per_s(DType::bf16, 128, kernels::Mask::none, 8, 64) == Approx(15e9));
  CHECK_THROWS_AS(machine.flops_per_s(DType::fp32, 64, kernels::Mask::none, 1, 64), InvalidArgument);

  const TransferTable table({{100, 10.0}, {200, 12.0}});
  CHECK(table.us(0) == 0);
  CHECK(table.us(10) == Approx(10));
  CHECK(table.us(150) == Approx(11));
  CHECK(table.us(400) == Approx(16));
  CHECK_THROWS_AS(TransferTable({{100, 1.0}, {100, 2.0}}), InvalidArgument);
  CHECK_THROWS_AS(TransferTable({{100, 0.0}}), InvalidArgument);
}

TEST_CASE("some ranks among equals take about the time that all on one clock take") {
  const std::int64_t ranks = 256;
  const std::int64_t rows = 32;
  for (const bool causal : {false, true}) {
    const Problem problem = problem_of(ranks * rows, causal);
    for (const double transfer : {0.002, 0.1, 2.0}) {
      for (const Schedule schedule : {Schedule::ring, Schedule::direct, Schedule::allgather}) {
        const bool apart = causal && schedule != Schedule::ring;
        const PartitionKind kind = apart ? PartitionKind::zigzag : PartitionKind::contiguous;
        const Machine machine = machine_of(apart ? rows / 2 : rows, transfer);

        const double all = simulate(plans_of(problem, kind, Routing{schedule}, ranks), machine).total_ms;
        const Prediction some =
            predict(problem, dense(problem.seq_len), Partition(kind, problem.seq_len, ranks), Routing{schedule}, machine);

        INFO(causal << " transfers of " << transfer << " " << to_string(schedule) << ": " << some.total_ms << " of some, " << all
                    << " of all");
        CHECK(some.interpreted < ranks);
        CHECK(some.total_ms == Approx(all).epsilon(0.02));
      }
    }
  }
}

TEST_CASE("the time of 4,096 ranks is predicted from the plans of some in seconds, and what busy senders cost is in it") {
  const std::int64_t ranks = 4096;
  const std::int64_t rows = 1024;
  const Problem problem = problem_of(ranks * rows, true);
  const Partition partition(PartitionKind::zigzag, problem.seq_len, ranks);
  const auto began = std::chrono::steady_clock::now();

  const auto time_with = [&](double transfer) {
    return predict(problem, dense(problem.seq_len), partition, Routing{Schedule::direct, KeyOrder::cyclic, 256},
                   machine_of(rows / 2, transfer));
  };
  const Prediction quick = time_with(1e-5);
  const Prediction busy = time_with(0.1);

  CHECK(std::chrono::steady_clock::now() - began < std::chrono::seconds(10));
  CHECK(quick.interpreted < 10);
  CHECK(quick.ranks == ranks);
  CHECK(quick.total_ms == Approx(2 * ranks * kUnitMs).epsilon(0.01));
  CHECK(std::ssize(quick.steps) == 2 * ranks);
  // The owner of piece n sends it to 4,095 - n ranks in one step, a tenth of a unit each, and serves each when it comes to the step.
  CHECK(busy.total_ms == Approx(0.1 * ranks * ranks / 4 * kUnitMs).epsilon(0.02));
}
