// SPDX-License-Identifier: Apache-2.0
// A multihead layer on the ranks of a job, against its definition in fp64: no further from it than a plain layer of the same precision.
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/session/check.hpp>
#include <annulus/session/session.hpp>
#include <annulus_test.hpp>

#include "../io/raw_dataset.hpp"
#include "layer_model.hpp"
#include "mpi_world.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

using namespace annulus;

namespace {

const bool kOnGpu = std::string(ANNULUS_TEST_BACKEND) == "cuda";

/// Says so, if there is no GPU to run on.
bool skipped() {
  if (!kOnGpu || !visible_gpus().empty()) { return false; }
  test::skip("no GPU");
  return true;
}

struct Case {
  std::string name;
  std::function<void(Config&)> set;
};

std::vector<Case> cases() {
  return {
      {"plain", [](Config&) {}},
      {"biases", [](Config& c) { c.layer->bias = true; }},
      {"layer norm of q and k",
       [](Config& c) {
         c.layer->qk_norm = Norm::layer;
         c.layer->bias = true;
       }},
      {"rms norm of q and k, neighbouring pairs, causal",
       [](Config& c) {
         c.layer->qk_norm = Norm::rms;
         c.layer->rotary = RotaryPairs::neighbouring;
         c.problem.causal = true;
       }},
      {"half pairs, another base",
       [](Config& c) {
         c.layer->rotary = RotaryPairs::half;
         c.layer->rotary_base = 50;
       }},
      {"layer norm of the output", [](Config& c) { c.layer->output_norm = Norm::layer; }},
      {"rms norm of the output and a gate of tanh",
       [](Config& c) {
         c.layer->output_norm = Norm::rms;
         c.layer->gate = Gate::tanh;
         c.layer->gate_temperature = 0.5;
       }},
      {"a gate of sigmoid with a bias",
       [](Config& c) {
         c.layer->gate = Gate::sigmoid;
         c.layer->bias = true;
       }},
      {"a gate of relu", [](Config& c) { c.layer->gate = Gate::relu; }},
      {"a gate of gelu", [](Config& c) { c.layer->gate = Gate::gelu; }},
      {"other features of keys and values",
       [](Config& c) {
         c.layer->embed = 19;
         c.layer->kdim = 33;
         c.layer->vdim = 7;
       }},
      {"shared KV heads, lengths of keys",
       [](Config& c) {
         c.problem.kv_heads = 1;
         c.problem.kv_lengths = {51, 40};
         c.layer->rotary = RotaryPairs::half;
       }},
      {"zigzag under a causal mask",
       [](Config& c) {
         c.problem.causal = true;
         c.partition = PartitionKind::zigzag;
         c.layer->rotary = RotaryPairs::neighbouring;
       }},
      {"an appended key and zero tokens, causal, lengths of keys",
       [](Config& c) {
         c.problem.kv_heads = 1;
         c.problem.causal = true;
         c.problem.kv_lengths = {51, 40};
         c.layer->bias_kv = true;
         c.layer->zero_tokens = 2;
         c.layer->rotary = RotaryPairs::half;
         c.layer->qk_norm = Norm::layer;
       }},
      {"a zero token alone", [](Config& c) { c.layer->zero_tokens = 1; }},
      {"everything",
       [](Config& c) {
         c.problem.kv_heads = 1;
         c.problem.causal = true;
         c.layer = Layer{.embed = 21, .kdim = 5, .vdim = 37, .bias = true, .qk_norm = Norm::layer, .output_norm = Norm::layer};
         c.layer->rotary = RotaryPairs::neighbouring;
         c.layer->gate = Gate::gelu;
         c.layer->gate_temperature = 2;
         c.layer->bias_kv = true;
         c.layer->zero_tokens = 1;
       }},
  };
}

void on_backend_of_test(Config& config) {
  config.backend = kOnGpu ? BackendKind::cuda : BackendKind::cpu;
  config.share_gpu = kOnGpu;
}

Config base_config(DType dtype) {
  Config config;
  config.problem = {2, 51, 3, 3, 10, dtype, false, 1.0};
  config.dtype = dtype;
  config.threads = 1;
  config.layer.emplace();
  on_backend_of_test(config);
  return config;
}

/// Rows of y that the ranks of this process own, by (batch, token).
template <class Visit>
void for_each_row(const Session& session, const Visit& visit) {
  const Problem& problem = session.problem();
  const std::int64_t embed = session.resolved().config.layer->embed;
  for (std::size_t index = 0; index < session.executors().size(); ++index) {
    const RingPlan& plan = session.executors()[index]->plan();
    const std::int64_t rank = session.comm().size() == 1 ? static_cast<std::int64_t>(index) : session.comm().rank();
    const std::int64_t first_batch = cell_of(problem, session.grid(), session.ring_of(rank)).first_batch;
    for (std::int64_t batch = first_batch; batch < first_batch + plan.problem.batch; ++batch) {
      for (const ShardPiece& piece : plan.shard.pieces) {
        for (std::int64_t i = 0; i < piece.global.count; ++i) {
          std::vector<std::byte> bytes(static_cast<std::size_t>(embed * size_of(problem.dtype)));
          session.layers()[index]->read_output(batch - first_batch, piece.local_first + i, 1, bytes.data());
          std::vector<float> values;
          kernels::with_element(problem.dtype, [&](auto tag) {
            const auto* elements = reinterpret_cast<const decltype(tag)*>(bytes.data());
            for (std::int64_t d = 0; d < embed; ++d) { values.push_back(kernels::to_float(elements[d])); }
          });
          visit(batch, piece.global.first + i, values);
        }
      }
    }
  }
}

/// Runs and compares. The sums are those of all ranks.
void require_as_near_as_plain(const Config& config, const Communicator& comm) {
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  const Layer& layer = *resolved.config.layer;
  const test::LayerModel<double> exact(*resolved.layer, layer, session.problem(), false);
  const test::LayerModel<float> plain(*resolved.layer, layer, session.problem(), true);
  double error = 0;
  double plain_error = 0;
  double norm = 0;
  std::int64_t rows = 0;
  for_each_row(session, [&](std::int64_t batch, std::int64_t token, const std::vector<float>& y) {
    const std::vector<double> expected = exact.row(batch, token);
    const std::vector<float> plainly = plain.row(batch, token);
    REQUIRE(y.size() == expected.size());
    for (std::size_t d = 0; d < y.size(); ++d) {
      error += std::pow(static_cast<double>(y[d]) - expected[d], 2);
      plain_error += std::pow(static_cast<double>(plainly[d]) - expected[d], 2);
      norm += expected[d] * expected[d];
    }
    ++rows;
  });
  error = std::sqrt(comm.sum(error));
  plain_error = std::sqrt(comm.sum(plain_error));
  norm = std::sqrt(comm.sum(norm));
  INFO("error " << error / norm << ", plain " << plain_error / norm);
  CHECK(comm.sum(rows) == session.problem().batch * session.problem().seq_len);
  CHECK(norm > 0);
  CHECK(error <= 1.1 * plain_error + 0x1p-24 * norm);

  const CaseReport report = check_session(session, 0);
  INFO(report.verdict.reason);
  CHECK(report.verdict.passed);
  CHECK(std::abs(report.verdict.rms_error * std::sqrt(static_cast<double>(report.sums.count)) - error) <= 1e-3 * error + 1e-12 * norm);
}

}  // namespace

TEST_CASE("a layer is as near to its definition as a plain one, in every option and on any ranks") {
  if (skipped()) { return; }
  const DType dtype = GENERATE(DType::fp32, DType::fp16, DType::bf16);
  for (const BackendKind backend : kOnGpu ? std::vector{BackendKind::cuda} : std::vector{BackendKind::cpu, BackendKind::reference}) {
    for (const Case& each : cases()) {
      Config config = base_config(dtype);
      config.backend = backend;
      each.set(config);
      INFO(each.name << ", " << to_string(dtype) << ", " << to_string(backend));
      require_as_near_as_plain(config, test::world());
    }
  }
}

TEST_CASE("a layer around a dilated pattern passes the check on any ranks") {
  if (skipped()) { return; }
  Config config = base_config(DType::fp32);
  config.problem = {1, 203, 6, 2, 8, DType::fp32, false, 1.0};
  config.pattern.branches = {{16, 1}, {50, 2}, {203, 4}};
  config.pattern.offset = OffsetRule::head;
  config.pattern.head_split = GENERATE(HeadSplit::first, HeadSplit::all);
  config.pattern.ragged = GENERATE(Ragged::short_stride, Ragged::wrap, Ragged::zero_keys);
  config.layer->output_norm = Norm::layer;
  config.layer->rotary = RotaryPairs::half;
  const ResolvedConfig resolved = resolve(config, test::world());
  Session session(resolved, test::world());
  session.load();
  session.run();

  const CaseReport report = check_session(session, 0);

  INFO(report.verdict.reason);
  CHECK(report.verdict.passed);
}

TEST_CASE("a layer has the same bits on any ranks whose rows are whole blocks, run after run, and in the memory that was planned") {
  if (kOnGpu) { return; }  // cuBLAS promises no bits
  const Communicator& comm = test::world();
  Config config = base_config(DType::bf16);
  config.problem = {1, 256 * 12, 2, 1, 16, DType::bf16, true, 1.0};
  config.layer->embed = 24;
  config.layer->rotary = RotaryPairs::neighbouring;
  config.layer->gate = Gate::sigmoid;
  const auto rows_of = [](const Session& session) {
    std::string bytes;
    const std::int64_t row_bytes = session.resolved().config.layer->embed * size_of(session.problem().dtype);
    for (std::size_t index = 0; index < session.executors().size(); ++index) {
      const std::int64_t rows = session.executors()[index]->plan().local_rows;
      std::string part(static_cast<std::size_t>(rows * row_bytes), '\0');
      session.layers()[index]->read_output(0, 0, rows, part.data());
      bytes += part;
    }
    return bytes;
  };
  config.partition = PartitionKind::contiguous;
  std::string expected;
  if (comm.rank() == 0) {
    const Communicator alone = Communicator::single();
    const ResolvedConfig resolved = resolve(config, alone);
    Session session(resolved, alone);
    session.load();
    session.run();
    expected = rows_of(session);
  }

  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  std::string found;
  for (const std::string& part : comm.gather(rows_of(session), 0)) { found += part; }
  const std::string before = rows_of(session);
  session.run();

  CHECK((comm.rank() != 0 || found == expected));
  CHECK(rows_of(session) == before);
  CHECK(session.device().memory().high_water <= session.predicted_bytes());
  // Rows of x and y go with the rank's share of the tokens.
  const RingPlan& plan = session.executors().front()->plan();
  const LayerCost cost = layer_cost_of(resolved.config, *resolved.layer, plan.problem, plan.local_rows);
  CHECK(cost.activation_bytes == 2 * 24 * 2 * 256 * 12 / comm.size());
}

TEST_CASE("virtual ranks share one layer's weights and compute its rows") {
  if (skipped()) { return; }
  if (test::world().size() > 1) { return; }
  Config config = base_config(DType::fp32);
  config.virtual_ranks = GENERATE(5, 8);
  config.layer->gate = Gate::relu;
  config.layer->rotary = RotaryPairs::half;

  require_as_near_as_plain(config, Communicator::single());
}

TEST_CASE("rings of a grid take batch entries each, on virtual ranks and on those of a job") {
  if (skipped()) { return; }
  const Communicator& comm = test::world();
  Config config = base_config(DType::fp32);
  config.layer->rotary = RotaryPairs::neighbouring;
  config.layer->gate = Gate::sigmoid;
  config.problem.kv_lengths = {51, 17};
  config.grid.batch = 2;
  if (comm.size() == 1) { config.virtual_ranks = 6; }
  if (comm.size() % 2 == 0 || comm.size() == 1) { require_as_near_as_plain(config, comm); }

  config.grid = Grid{};
  config.grid.automatic = true;
  require_as_near_as_plain(config, comm);
}

TEST_CASE("the layer of a language model gives what the model computed") {
  if (skipped()) { return; }
  const Communicator& comm = test::world();
  Config config;
  config.input = std::string(ANNULUS_TEST_DATA) + "/layer_sample.h5";
  config.problem.causal = true;
  config.layer.emplace();
  config.threads = 1;
  on_backend_of_test(config);
  const ResolvedConfig resolved = resolve(config, comm);
  CHECK(resolved.config.problem.heads == 9);
  CHECK(resolved.config.layer->rotary == RotaryPairs::neighbouring);
  Session session(resolved, comm);
  session.load();
  session.run();

  const test::RawDataset model(config.input, "/y");
  double error = 0;
  double norm = 0;
  for_each_row(session, [&](std::int64_t /*batch*/, std::int64_t token, const std::vector<float>& y) {
    for (std::size_t d = 0; d < y.size(); ++d) {
      const auto expected = static_cast<double>(model.as<float>()[static_cast<std::size_t>(token) * y.size() + d]);
      error += std::pow(static_cast<double>(y[d]) - expected, 2);
      norm += expected * expected;
    }
  });
  CHECK(std::sqrt(comm.sum(error) / comm.sum(norm)) <= 1e-5);
}

TEST_CASE("what a layer cannot be is refused by its option") {
  if (kOnGpu) { return; }  // whatever computes it
  const Communicator& comm = test::world();
  struct Refused {
    std::string part;
    std::function<void(Config&)> set;
  };
  const std::vector<Refused> all{
      {"head-dim 9 is odd",
       [](Config& c) {
         c.problem.head_dim = 9;
         c.layer->rotary = RotaryPairs::half;
       }},
      {"--grid batch=1,heads=3 spreads heads", [](Config& c) { c.grid.heads = 3; }},
      {"--order is hilbert", [](Config& c) { c.pattern.order = SequenceOrder::hilbert; }},
      {"layer.gate-temperature 0", [](Config& c) { c.layer->gate_temperature = 0; }},
      {"layer.norm-epsilon -1", [](Config& c) { c.layer->norm_epsilon = -1; }},
      {"layer.rotary-base 0", [](Config& c) { c.layer->rotary_base = 0; }},
  };
  for (const Refused& each : all) {
    Config config = base_config(DType::fp32);
    each.set(config);
    std::string message = "accepted";
    try {
      resolve(config, comm);
    } catch (const Error& error) { message = error.what(); }
    CHECK_THAT(message, test::contains_text(each.part));
  }
}
