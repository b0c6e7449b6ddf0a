// SPDX-License-Identifier: Apache-2.0
// Dropout of sessions in one process: the draws that the oracle makes, however the problem is spread.
#include <annulus/core/error.hpp>
#include <annulus/session/check.hpp>
#include <annulus/session/session.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

using namespace annulus;

namespace {

Config base_config() {
  Config config;
  config.problem.batch = 2;
  config.problem.seq_len = 150;
  config.problem.heads = 4;
  config.problem.kv_heads = 2;
  config.problem.head_dim = 16;
  config.problem.dropout = {0.3, 5, 0};
  config.pattern.branches = {{40, 1}, {90, 3}, {150, 5}};
  config.pattern.head_split = HeadSplit::all;
  config.pattern.offset = OffsetRule::head;
  config.threads = 2;
  config.backend = BackendKind::cpu;
  config.transport = TransportKind::loopback;
  return config;
}

CaseReport report_of(const Config& config) {
  const Communicator comm = Communicator::single();
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  return check_session(session, 0);
}

void expect_right(const Config& config) {
  const CaseReport report = report_of(config);
  INFO(report.verdict.reason);
  CHECK(report.verdict.passed);
  CHECK(report.gradients.size() == (config.gradients ? 3U : 0U));
}

/// O of the whole problem, [batch, seq, head, head_dim] in fp32.
std::vector<float> output_of(const Config& config) {
  const Communicator comm = Communicator::single();
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  const Problem& problem = session.problem();
  std::vector<float> out(static_cast<std::size_t>(problem.batch * problem.seq_len * problem.heads * problem.head_dim));
  for (const LocalRing& ring : session.rings()) {
    const std::int64_t row_elements = ring.cell.problem.heads * problem.head_dim;
    for (const auto& executor : ring.executors) {
      const std::int64_t rows = executor->plan().local_rows;
      std::vector<float> own(static_cast<std::size_t>(rows * row_elements));
      for (std::int64_t entry = 0; entry < ring.cell.problem.batch; ++entry) {
        executor->read_output(entry, 0, rows, own.data());
        for (const ShardPiece& piece : executor->plan().shard.pieces) {
          for (std::int64_t i = 0; i < piece.global.count; ++i) {
            const std::int64_t row = (ring.cell.first_batch + entry) * problem.seq_len + piece.global[i];
            std::copy_n(own.data() + (piece.local_first + i) * row_elements, row_elements,
                        out.data() + (row * problem.heads + ring.cell.first_head) * problem.head_dim);
          }
        }
      }
    }
  }
  return out;
}

}  // namespace

TEST_CASE("what is dropped does not depend on ranks, schedule, partition, grid, backend or tiles") {
  const std::vector<std::function<void(Config&)>> ways{[](Config& c) { c.virtual_ranks = 1; },
                                                       [](Config& c) { c.virtual_ranks = 3; },
                                                       [](Config& c) { c.virtual_ranks = 16; },
                                                       [](Config& c) {
                                                         c.virtual_ranks = 4;
                                                         c.schedule = Schedule::direct;
                                                       },
                                                       [](Config& c) {
                                                         c.virtual_ranks = 3;
                                                         c.partition = PartitionKind::zigzag;
                                                       },
                                                       [](Config& c) {
                                                         c.virtual_ranks = 8;
                                                         c.grid.batch = 2;
                                                         c.grid.heads = 2;
                                                       },
                                                       [](Config& c) {
                                                         c.virtual_ranks = 2;
                                                         c.tile_rows = 16;
                                                       },
                                                       [](Config& c) {
                                                         c.virtual_ranks = 2;
                                                         c.backend = BackendKind::reference;
                                                       }};
  for (std::size_t way = 0; way < ways.size(); ++way) {
    for (const bool causal : {false, true}) {
      for (const bool gradients : {false, true}) {
        INFO("way " << way << (causal ? ", causal" : "") << (gradients ? ", gradients" : ""));
        Config config = base_config();
        ways[way](config);
        config.problem.causal = causal;
        config.gradients = gradients;
        expect_right(config);
      }
    }
  }
}

TEST_CASE("dropout keeps the bits of one rank under every schedule and on a grid, where shards are whole blocks") {
  Config one = base_config();
  one.problem.seq_len = 2048;
  one.problem.head_dim = 8;
  one.pattern.branches = {{512, 1}, {2048, 2}};  // which share pairs of queries and keys
  one.virtual_ranks = 1;
  const std::vector<float> expected = output_of(one);
  for (const Schedule schedule : {Schedule::ring, Schedule::ring_full, Schedule::direct, Schedule::allgather}) {
    INFO(to_string(schedule));
    Config config = one;
    config.virtual_ranks = 4;
    config.schedule = schedule;
    CHECK(output_of(config) == expected);
  }
  Config grid = one;
  grid.virtual_ranks = 8;
  grid.grid.batch = 2;
  grid.grid.heads = 2;
  CHECK(output_of(grid) == expected);
  grid.grid.batch = 1;
  grid.grid.heads = 4;  // a KV head in two rings
  CHECK(output_of(grid) == expected);
}

TEST_CASE("causal dropout keeps the bits of one rank on 16 ranks of a zigzag") {
  Config one = base_config();
  one.problem = {1, 8192, 1, 1, 8, DType::fp32, true, 1.0};
  one.problem.dropout = {0.3, 5, 0};
  one.pattern = {};
  one.virtual_ranks = 1;
  Config zigzag = one;
  zigzag.virtual_ranks = 16;
  zigzag.partition = PartitionKind::zigzag;
  zigzag.schedule = Schedule::direct;
  CHECK(output_of(zigzag) == output_of(one));
}

TEST_CASE("dropout goes with every mixing and ragged rule, extra keys, lengths of keys, an order and 16 bits") {
  const std::vector<std::function<void(Config&)>> settings{[](Config& c) { c.pattern.mixing = Mixing::mean; },
                                                           [](Config& c) { c.pattern.mixing = Mixing::sum; },
                                                           [](Config& c) { c.pattern.ragged = Ragged::zero_keys; },
                                                           [](Config& c) { c.pattern.ragged = Ragged::wrap; },
                                                           [](Config& c) { c.problem.kv_lengths = {150, 61}; },
                                                           [](Config& c) { c.pattern.order = SequenceOrder::hilbert; },
                                                           [](Config& c) { c.dtype = DType::bf16; },
                                                           [](Config& c) { c.dtype = DType::fp16; }};
  for (std::size_t setting = 0; setting < settings.size(); ++setting) {
    for (const bool gradients : {false, true}) {
      INFO("setting " << setting << (gradients ? ", gradients" : ""));
      Config config = base_config();
      config.virtual_ranks = 3;
      config.gradients = gradients;
      settings[setting](config);
      expect_right(config);
    }
  }
  for (const Mixing mixing : {Mixing::lse, Mixing::mean}) {
    Config config = base_config();
    config.virtual_ranks = 3;
    config.problem.extra_keys = 5;
    config.pattern.mixing = mixing;
    expect_right(config);
  }
}

TEST_CASE("the mean of many draws is the attention without") {
  Config config = base_config();
  config.problem.batch = 1;
  config.virtual_ranks = 1;
  config.problem.dropout.probability = 0;
  const std::vector<float> whole = output_of(config);
  config.problem.dropout.seed = 9;
  CHECK(output_of(config) == whole);

  constexpr int kDraws = 64;
  config.problem.dropout.probability = 0.2;
  std::vector<double> sum(whole.size());
  std::vector<double> squares(whole.size());
  for (int draw = 0; draw < kDraws; ++draw) {
    config.problem.dropout.seed = draw;
    const std::vector<float> out = output_of(config);
    for (std::size_t i = 0; i < out.size(); ++i) {
      sum[i] += static_cast<double>(out[i]);
      squares[i] += static_cast<double>(out[i]) * static_cast<double>(out[i]);
    }
  }
  // Of all elements, the mean of the squares of what the mean is off by, in its standard deviations, is 1.
  double off = 0;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    const double mean = sum[i] / kDraws;
    const double variance = (squares[i] / kDraws - mean * mean) / (kDraws - 1);
    off += (mean - static_cast<double>(whole[i])) * (mean - static_cast<double>(whole[i])) / (variance + 1e-18);
  }
  off /= static_cast<double>(whole.size());
  CHECK(off > 0.8);
  CHECK(off < 1.3);
}

TEST_CASE("the same draws in every run, others by another seed") {
  Config config = base_config();
  config.virtual_ranks = 1;
  const std::vector<float> once = output_of(config);
  CHECK(output_of(config) == once);
  config.problem.dropout.seed = 6;
  CHECK_FALSE(output_of(config) == once);
}

TEST_CASE("a probability outside [0, 1) is refused") {
  for (const double probability : {-0.1, 1.0, 2.0, std::nan("")}) {
    Config config = base_config();
    config.problem.dropout.probability = probability;
    CHECK_THROWS_AS(report_of(config), InvalidArgument);
  }
}
