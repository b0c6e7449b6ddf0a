// SPDX-License-Identifier: Apache-2.0
// Gradients of sessions in one process, against the oracle and against each other.
#include <annulus/core/error.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/session/check.hpp>
#include <annulus/session/session.hpp>
#include <annulus_test.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

using namespace annulus;

namespace {

const bool kOnGpu = std::string(ANNULUS_TEST_BACKEND) == "cuda";
const BackendKind kBackend = kOnGpu ? BackendKind::cuda : BackendKind::cpu;

/// Says so, if there is no GPU to run on.
bool skipped() {
  if (!kOnGpu || !visible_gpus().empty()) { return false; }
  test::skip("no GPU");
  return true;
}

Config config_of(std::int64_t seq_len, std::int64_t ranks, DType dtype = DType::fp32, BackendKind backend = kBackend) {
  Config config;
  config.problem.batch = 2;
  config.problem.seq_len = seq_len;
  config.problem.heads = 4;
  config.problem.kv_heads = 2;
  config.problem.head_dim = 24;
  config.gradients = true;
  config.dtype = dtype;
  config.threads = 2;
  config.backend = backend;
  config.virtual_ranks = ranks;
  config.transport = TransportKind::loopback;
  return config;
}

/// Gradients of Q, K and V of all rows, one after the other.
std::vector<std::byte> gradients(const Session& session) {
  const Problem& problem = session.problem();
  std::vector<std::byte> all;
  for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v}) {
    const std::size_t begin = all.size();
    const std::int64_t bytes = row_bytes(problem, tensor);
    all.resize(begin + static_cast<std::size_t>(problem.batch * problem.seq_len * bytes));
    for (const auto& executor : session.executors()) {
      for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
        for (const ShardPiece& piece : executor->plan().shard.pieces) {
          executor->read_gradient(tensor, batch, piece.local_first, piece.global.count,
                                  all.data() + begin + (batch * problem.seq_len + piece.global.first) * bytes);
        }
      }
    }
  }
  return all;
}

std::vector<double> numbers(DType dtype, const std::vector<std::byte>& bytes) {
  std::vector<double> values;
  kernels::with_element(dtype, [&](auto tag) {
    const auto* elements = reinterpret_cast<const decltype(tag)*>(bytes.data());
    for (std::size_t i = 0; i < bytes.size() / sizeof(tag); ++i) { values.push_back(static_cast<double>(kernels::to_float(elements[i]))); }
  });
  return values;
}

/// RMS of the difference over that of `b`.
double relative_difference(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double difference = 0;
  double size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(difference / size);
}

struct Run {
  CaseReport report;
  std::vector<std::byte> gradients;
};

Run run(const Config& config) {
  const Communicator comm = Communicator::single();
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  // Of a grid no executor has all batch entries and heads.
  return {check_session(session, 0), session.rings().size() == 1 ? gradients(session) : std::vector<std::byte>()};
}

void expect_right(const Config& config) {
  const Run done = run(config);
  INFO(done.report.verdict.reason);
  CHECK(done.report.verdict.passed);
  CHECK(done.report.gradients.size() == 3);
  CHECK(done.report.gradient_kv_heads == config.problem.kv_heads);
}

}  // namespace

TEST_CASE("gradients are the oracle's under every schedule and partition, causal and not, on 1 to 16 virtual ranks") {
  if (skipped()) { return; }
  for (const Schedule schedule : {Schedule::ring, Schedule::ring_full, Schedule::direct, Schedule::allgather}) {
    for (const PartitionKind partition : {PartitionKind::contiguous, PartitionKind::zigzag, PartitionKind::striped}) {
      for (const bool causal : {false, true}) {
        for (const std::int64_t ranks : {1, 3, 16}) {
          INFO(to_string(schedule) << ", " << to_string(partition) << ", " << (causal ? "causal, " : "") << ranks << " ranks");
          Config config = config_of(61, ranks);
          config.schedule = schedule;
          config.partition = partition;
          config.problem.causal = causal;
          config.pattern.branches = {{16, 1}, {40, 3}, {61, 5}};
          config.pattern.head_split = HeadSplit::all;
          config.pattern.offset = OffsetRule::head;
          expect_right(config);
        }
      }
    }
  }
}

TEST_CASE("gradients are the oracle's under every ragged rule and mixing, in every dtype, on both backends") {
  if (skipped()) { return; }
  for (const auto& [ragged, name] : EnumNames<Ragged>::values) {
    if (ragged == Ragged::reject) { continue; }
    for (const auto& [mixing, mixing_name] : EnumNames<Mixing>::values) {
      for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
        for (const BackendKind backend : kOnGpu ? std::vector{kBackend} : std::vector{BackendKind::reference, BackendKind::cpu}) {
          INFO(name << ", " << mixing_name << ", " << to_string(dtype) << ", " << to_string(backend));
          Config config = config_of(53, 4, dtype, backend);
          config.pattern.branches = {{12, 5}, {31, 3}, {53, 2}};
          config.pattern.head_split = HeadSplit::all;
          config.pattern.ragged = ragged;
          config.pattern.mixing = mixing;
          config.pattern.scale_by_branches = mixing == Mixing::sum;
          expect_right(config);
        }
      }
    }
  }
}

TEST_CASE("gradients of long rows, of fewer rows than ranks, of hidden keys and in another order are the oracle's") {
  if (skipped()) { return; }
  Config long_one = config_of(700, 3);
  long_one.problem.batch = 1;
  long_one.problem.causal = true;
  long_one.problem.head_dim = 40;
  expect_right(long_one);

  expect_right(config_of(3, 7));

  Config hidden = config_of(50, 4);
  hidden.problem.kv_lengths = {50, 9};
  expect_right(hidden);

  Config permuted = config_of(45, 3);
  permuted.pattern.branches = {{20, 2}, {45, 3}};
  permuted.pattern.head_split = HeadSplit::all;
  permuted.pattern.order = SequenceOrder::hilbert;
  expect_right(permuted);

  Config grid = config_of(45, 8);
  grid.grid = {2, 2, 2};
  expect_right(grid);
}

TEST_CASE("any number of ranks gives the gradients of one rank within rounding") {
  if (skipped()) { return; }
  for (const bool causal : {false, true}) {
    Config config = config_of(211, 1);
    config.problem.causal = causal;
    const std::vector<double> alone = numbers(DType::fp32, run(config).gradients);
    for (const std::int64_t ranks : {2, 3, 4, 16}) {
      INFO(ranks << " ranks");
      config.virtual_ranks = ranks;
      CHECK(relative_difference(numbers(DType::fp32, run(config).gradients), alone) < 2e-6);
    }
  }
}

TEST_CASE("gradients have the same bits in every repetition, on any number of threads, and after runs that pass nothing") {
  if (skipped()) { return; }
  const Communicator comm = Communicator::single();
  Config config = config_of(333, 5);
  config.problem.head_dim = 33;
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  const std::vector<std::byte> first = gradients(session);
  for (int repetition = 0; repetition < 20; ++repetition) {
    if (repetition % 4 == 0) { session.run(Passing::off); }
    session.run();
    REQUIRE(gradients(session) == first);
  }
  if (kOnGpu) { return; }
  config.threads = 3;
  CHECK(run(config).gradients == first);
}

TEST_CASE("three steps with other inputs each give what three sessions of their own give") {
  if (skipped()) { return; }
  const Communicator comm = Communicator::single();
  Config config = config_of(97, 4);
  config.pattern.branches = {{30, 2}, {97, 3}};
  config.pattern.head_split = HeadSplit::all;
  config.pattern.mixing = Mixing::mean;
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  for (const std::uint64_t seed : {5U, 6U, 7U}) {
    const auto source = make_generator(resolved.config.problem, seed);
    for (const auto& executor : session.executors()) { executor->load(*source); }
    session.run();
    config.seed = seed;
    CHECK(gradients(session) == run(config).gradients);
  }
}

TEST_CASE("rows that no branch covers have gradients of exactly 0") {
  if (skipped()) { return; }
  Config config = config_of(41, 3);
  config.pattern.branches = {{41, 4}};
  config.problem.batch = 1;
  const std::vector<double> found = numbers(DType::fp32, run(config).gradients);
  const auto width = static_cast<std::size_t>(config.problem.heads * config.problem.head_dim);
  std::size_t zeros = 0;
  for (std::size_t i = 0; i < 41 * width; ++i) {
    if (i / width % 4 == 0) { continue; }
    CHECK(found[i] == 0.0);
    ++zeros;
  }
  CHECK(zeros == 30 * width);
}

TEST_CASE("memory is what the plan says, and falls with the number of ranks") {
  if (skipped()) { return; }
  const Communicator comm = Communicator::single();
  std::int64_t before = 0;
  for (const std::int64_t ranks : {1, 4}) {
    Config config = config_of(4096, ranks);
    config.problem.batch = 1;
    config.problem.head_dim = 64;
    config.pattern.branches = {{256, 1}};
    const ResolvedConfig resolved = resolve(config, comm);
    Session session(resolved, comm);
    session.load();
    session.run();
    const std::int64_t used = session.device().memory().high_water;
    CHECK(static_cast<double>(used) <= 1.05 * static_cast<double>(session.predicted_bytes()));
    CHECK(static_cast<double>(used) >= 0.95 * static_cast<double>(session.predicted_bytes()));
    const RingPlan& plan = session.executors().front()->plan();
    const MemoryPlan memory = plan_memory(plan.problem, sizes_of(plan), 0);
    if (before > 0) { CHECK(memory.gradients * ranks == before); }
    before = memory.gradients;
  }
}

TEST_CASE("what has no backward pass is refused with what has one") {
  if (skipped()) { return; }
  const Communicator comm = Communicator::single();
  Config layer = config_of(16, 1);
  layer.layer.emplace();
  CHECK_THROWS_WITH(resolve(layer, comm), annulus::test::contains_text("--gradients: a layer has no backward pass"));

  Config extra = config_of(16, 1);
  extra.problem.extra_keys = 2;
  CHECK_THROWS_WITH(resolve(extra, comm), annulus::test::contains_text("--gradients: extra keys have no backward pass"));

  Config grid = config_of(16, 4);
  grid.grid = {1, 4, 1};
  CHECK_THROWS_WITH(resolve(grid, comm), annulus::test::contains_text("gives a KV head to several rings"));
}
