// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/pattern/permutation.hpp>
#include <annulus/session/check.hpp>
#include <annulus/session/session.hpp>
#include <annulus_test.hpp>

#include "verify/memory_source.hpp"

#include <cmath>
#include <memory>
#include <random>
#include <vector>

using namespace annulus;

namespace {

Config config_of(std::int64_t seq_len, std::int64_t ranks, DType dtype, BackendKind backend) {
  Config config;
  config.problem.seq_len = seq_len;
  config.problem.heads = 2;
  config.problem.kv_heads = 1;
  config.problem.head_dim = 24;
  config.dtype = dtype;
  config.threads = 2;
  config.backend = backend;
  config.virtual_ranks = ranks;
  config.transport = TransportKind::loopback;
  return config;
}

/// O of all rows of a loopback session, [batch, row, head, head_dim] raw bytes.
std::vector<std::byte> outputs(Session& session) {
  const Problem& problem = session.problem();
  const std::int64_t row_bytes = problem.heads * problem.head_dim * size_of(problem.dtype);
  std::vector<std::byte> all(static_cast<std::size_t>(problem.batch * problem.seq_len * row_bytes));
  for (const auto& executor : session.executors()) {
    for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
      for (const ShardPiece& piece : executor->plan().shard.pieces) {
        executor->read_output(batch, piece.local_first, piece.global.count,
                              all.data() + (batch * problem.seq_len + piece.global.first) * row_bytes);
      }
    }
  }
  return all;
}

}  // namespace

TEST_CASE("the error of 16-bit data does not grow with the number of ranks") {
  const Communicator comm = Communicator::single();
  for (const DType dtype : {DType::bf16, DType::fp16}) {
    double alone = 0;
    for (const std::int64_t ranks : {1, 8, 16}) {
      const ResolvedConfig resolved = resolve(config_of(1024, ranks, dtype, BackendKind::cpu), comm);
      Session session(resolved, comm);
      session.load();
      session.run();
      const CaseReport report = check_session(session, 0);
      INFO(to_string(dtype) << " on " << ranks << " ranks: " << report.verdict.reason);
      CHECK(report.verdict.passed);
      CHECK(report.verdict.ratio <= 1.2);
      if (ranks == 1) { alone = report.verdict.rms_error; }
      CHECK(report.verdict.rms_error <= 1.03 * alone);
    }
  }
}

TEST_CASE("repetitions give the same bits, and passing off changes no buffer that passing on needs") {
  const Communicator comm = Communicator::single();
  const ResolvedConfig resolved = resolve(config_of(333, 5, DType::fp32, BackendKind::cpu), comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  const std::vector<std::byte> first = outputs(session);
  for (int repetition = 0; repetition < 20; ++repetition) {
    if (repetition % 3 == 0) { session.run(Passing::off); }
    session.run();
    REQUIRE(outputs(session) == first);
  }
}

TEST_CASE("schedules ring and ring-full agree with one rank within rounding") {
  const Communicator comm = Communicator::single();
  for (const Schedule schedule : {Schedule::ring, Schedule::ring_full, Schedule::direct, Schedule::allgather}) {
    for (const bool causal : {false, true}) {
      Config config = config_of(257, 7, DType::fp32, BackendKind::reference);
      config.schedule = schedule;
      config.problem.causal = causal;
      config.pattern.branches = {{16, 1}, {100, 3}, {300, 7}};
      config.pattern.head_split = HeadSplit::all;
      config.pattern.offset = OffsetRule::segment;
      const ResolvedConfig resolved = resolve(config, comm);
      Session session(resolved, comm);
      session.load();
      session.run();
      const CaseReport report = check_session(session, 0);
      INFO(report.verdict.reason);
      CHECK(report.verdict.passed);
      CHECK(report.rows_checked == 257);
    }
  }
}

TEST_CASE("changing future keys leaves causal outputs unchanged, bit for bit, on every number of ranks") {
  /// Rows at and after `cut` of K and V are replaced.
  class Changed final : public TensorSource {
   public:
    Changed(std::shared_ptr<const TensorSource> inner, std::int64_t cut) : inner_(std::move(inner)), cut_(cut) {}
    const Problem& problem() const override { return inner_->problem(); }
    std::string describe() const override { return "changed"; }
    std::string identity() const override { return describe(); }
    std::uint64_t fingerprint(Tensor /*tensor*/, std::int64_t /*part*/, std::int64_t /*parts*/) const override { return 0; }
    void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
      inner_->read(tensor, batch, first, count, dtype, out);
      if (tensor == Tensor::q) { return; }
      const std::int64_t width = problem().kv_heads * problem().head_dim;
      for (std::int64_t row = std::max(first, cut_); row < first + count; ++row) {
        for (std::int64_t i = 0; i < width; ++i) { static_cast<float*>(out)[(row - first) * width + i] = 1000.0F + static_cast<float>(i); }
      }
    }

   private:
    std::shared_ptr<const TensorSource> inner_;
    std::int64_t cut_;
  };
  const Communicator comm = Communicator::single();
  for (const std::int64_t ranks : {1, 3, 8}) {
    Config config = config_of(120, ranks, DType::fp32, BackendKind::cpu);
    config.problem.causal = true;
    config.pattern.branches = {{32, 1}, {128, 3}};
    config.pattern.head_split = HeadSplit::all;
    ResolvedConfig resolved = resolve(config, comm);
    std::vector<std::vector<std::byte>> results;
    for (const bool changed : {false, true}) {
      ResolvedConfig one = resolved;
      if (changed) { one.source = std::make_shared<Changed>(resolved.source, 70); }
      Session session(one, comm);
      session.load();
      session.run();
      results.push_back(outputs(session));
    }
    const auto kept = static_cast<std::ptrdiff_t>(70 * 2 * 24 * 4);
    CHECK(std::equal(results[0].begin(), results[0].begin() + kept, results[1].begin()));
    CHECK_FALSE(std::equal(results[0].begin() + kept, results[0].end(), results[1].begin() + kept));
  }
}

TEST_CASE("an order of the sequence is the linear operator on a permuted input, bit for bit") {
  const Communicator comm = Communicator::single();
  const test::MemorySource::Value values = test::scattered_values(3);
  for (const auto& [kind, name] : EnumNames<SequenceOrder>::values) {
    for (const PartitionKind partition : {PartitionKind::contiguous, PartitionKind::zigzag, PartitionKind::striped}) {
      for (const std::int64_t ranks : {1, 4, 7}) {
        Config config = config_of(531, ranks, DType::bf16, BackendKind::cpu);
        config.problem.batch = 2;
        config.partition = partition;
        config.pattern.branches = {{32, 1}, {128, 3}};
        config.pattern.head_split = HeadSplit::all;
        const auto run = [&](SequenceOrder order, const test::MemorySource::Value& value) {
          config.pattern.order = order;
          ResolvedConfig resolved = resolve(config, comm);
          resolved.source = std::make_shared<test::MemorySource>(resolved.source->problem(), value);
          Session session(resolved, comm);
          session.load();
          session.run();
          return outputs(session);
        };
        const Permutation order(kind, 531);
        const auto permuted = [&](Tensor tensor, std::int64_t batch, std::int64_t token, std::int64_t head, std::int64_t dim) {
          return values(tensor, batch, order.row_at(token), head, dim);
        };

        INFO(name << ", " << to_string(partition) << ", " << ranks << " ranks");
        CHECK(run(kind, values) == run(SequenceOrder::linear, permuted));
      }
    }
  }
}

TEST_CASE("memory in use is what the plan predicts") {
  const Communicator comm = Communicator::single();
  for (const std::int64_t ranks : {1, 4}) {
    Config config = config_of(4096, ranks, DType::bf16, BackendKind::cpu);
    config.problem.heads = config.problem.kv_heads = 8;
    config.problem.head_dim = 64;
    const ResolvedConfig resolved = resolve(config, comm);
    Session session(resolved, comm);
    session.load();
    session.run();
    const double used = static_cast<double>(session.device().memory().high_water);
    CHECK(std::abs(used / static_cast<double>(session.predicted_bytes()) - 1.0) <= 0.05);
  }
}

TEST_CASE("more memory than there is is refused with the numbers before any is allocated") {
  const Communicator comm = Communicator::single();
  Config config = config_of(std::int64_t{1} << 36, 1, DType::fp32, BackendKind::cpu);
  const ResolvedConfig resolved = resolve(config, comm);
  CHECK_THROWS_WITH(Session(resolved, comm), test::contains_text("bytes by plan"));
}

TEST_CASE("settings that contradict each other are refused") {
  const Communicator comm = Communicator::single();
  Config config = config_of(64, 4, DType::fp32, BackendKind::cpu);
  config.transport = TransportKind::mpi;
  CHECK_THROWS_AS(resolve(config, comm), InvalidArgument);
  config = config_of(64, 1, DType::fp32, BackendKind::cpu);
  config.problem.kv_heads = 3;
  CHECK_THROWS_AS(resolve(config, comm), InvalidArgument);
  config = config_of(64, 1, DType::fp32, BackendKind::cpu);
  config.input = ANNULUS_TEST_DATA "/attention_sample.h5";
  config.given.insert("seq-len");
  CHECK_THROWS_WITH(resolve(config, comm), test::contains_text("contradicts the input file"));
}

TEST_CASE("values among the subnormal numbers are attended as exactly as their format can hold") {
  const Communicator comm = Communicator::single();
  for (const BackendKind backend : {BackendKind::cpu, BackendKind::reference}) {
    for (const float size : {1e-38F, 1e-41F, 1e-44F}) {
      const ResolvedConfig resolved = [&] {
        ResolvedConfig made = resolve(config_of(100, 3, DType::fp32, backend), comm);
        const test::MemorySource::Value scattered = test::scattered_values(5);
        made.source = std::make_shared<test::MemorySource>(
            made.source->problem(), [=](Tensor tensor, std::int64_t batch, std::int64_t token, std::int64_t head, std::int64_t dim) {
              return scattered(tensor, batch, token, head, dim) * (tensor == Tensor::v ? size : 1.0F);
            });
        return made;
      }();
      Session session(resolved, comm);
      session.load();
      session.run();
      const CaseReport report = check_session(session, 0);
      INFO(to_string(backend) << " " << size << ": " << report.verdict.reason);
      CHECK(report.verdict.passed);
    }
  }
}
