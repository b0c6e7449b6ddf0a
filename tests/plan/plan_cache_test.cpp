// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/plan_cache.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

using namespace annulus;

namespace {

Problem problem_of(std::int64_t seq_len) {
  Problem problem;
  problem.seq_len = seq_len;
  problem.heads = 16;
  problem.kv_heads = 16;
  problem.head_dim = 64;
  problem.dtype = DType::bf16;
  return problem;
}

/// The least seconds of several calls: what is left is the work.
template <class Call>
double least_seconds(Call&& call) {
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 20; ++i) {
    const auto began = std::chrono::steady_clock::now();
    call();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  return least;
}

}  // namespace

TEST_CASE("equal arguments give the same plan, and any other argument another one") {
  PlanCache cache(64);
  const Problem problem = problem_of(96);
  const Pattern dense = dense_pattern(96);
  const Partition partition(PartitionKind::contiguous, 96, 3);
  const Routing ring{Schedule::ring};
  const auto plan = cache.plan(problem, dense, partition, ring, 1);
  CHECK(*plan == make_plan(problem, dense, partition, ring, 1));
  CHECK(cache.plan(problem, dense, partition, ring, 1) == plan);
  CHECK((cache.made() == 1 && cache.found() == 1));

  Problem causal = problem;
  causal.causal = true;
  Pattern scaled = dense;
  scaled.scale_by_branches = true;
  CHECK(cache.plan(causal, dense, partition, ring, 1) != plan);
  CHECK(cache.plan(problem, scaled, partition, ring, 1) != plan);
  CHECK(cache.plan(problem, dense, Partition(PartitionKind::zigzag, 96, 3), ring, 1) != plan);
  CHECK(cache.plan(problem, dense, Partition(PartitionKind::contiguous, 96, 4), ring, 1) != plan);
  CHECK(cache.plan(problem, dense, partition, Routing{Schedule::direct}, 1) != plan);
  CHECK(cache.plan(problem, dense, partition, Routing{Schedule::ring, KeyOrder::cyclic, 8}, 1) != plan);
  CHECK(cache.plan(problem, dense, partition, ring, 2) != plan);
  CHECK((cache.made() == 8 && cache.found() == 1));
  CHECK(cache.plan(problem, dense, partition, ring, 1) == plan);
}

TEST_CASE("a full cache forgets what was asked for longest ago, and one of no plans keeps none") {
  const Problem problem = problem_of(64);
  const Pattern dense = dense_pattern(64);
  const Partition partition(PartitionKind::contiguous, 64, 4);
  PlanCache two(2);
  const auto ask = [&](PlanCache& cache, std::int64_t rank) {
    return cache.plan(problem, dense, partition, Routing{Schedule::ring}, rank);
  };
  ask(two, 0);
  ask(two, 1);
  ask(two, 0);
  ask(two, 2);  // forgets 1
  CHECK(two.made() == 3);
  ask(two, 0);
  CHECK(two.made() == 3);
  ask(two, 1);
  CHECK(two.made() == 4);

  PlanCache none(0);
  CHECK(ask(none, 0) != ask(none, 0));
  CHECK((none.made() == 2 && none.found() == 0));
  CHECK_THROWS_AS(PlanCache(-1), InvalidArgument);
}

TEST_CASE("planning for a million tokens takes milliseconds, and microseconds from the cache") {
  const Problem problem = problem_of(std::int64_t{1} << 20);
  Pattern longnet;
  longnet.branches = {{2048, 1}, {4096, 2}, {8192, 4}, {16384, 6}, {32768, 12}};
  longnet.head_split = HeadSplit::all;
  longnet.offset = OffsetRule::head;
  const Partition partition(PartitionKind::contiguous, problem.seq_len, 64);
  const Routing routing{Schedule::ring, KeyOrder::cyclic, 128};
  CHECK(least_seconds([&] { make_plan(problem, longnet, partition, routing, 31); }) < 10e-3);
  PlanCache cache(64);
  for (std::int64_t rank = 0; rank < 64; ++rank) { cache.plan(problem, longnet, partition, routing, rank); }
  CHECK(least_seconds([&] { cache.plan(problem, longnet, partition, routing, 31); }) < 10e-6);
}
