// SPDX-License-Identifier: Apache-2.0
// What moves the blocks must not show in the result: one rank's session over every transport, against the same number of virtual ranks.
// Built once per backend.
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/session/session.hpp>
#include <annulus/transport/gpu_transports.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <cstddef>
#include <string>
#include <vector>

using namespace annulus;

namespace {

const bool kOnGpu = std::string(ANNULUS_TEST_BACKEND) == "cuda";

std::vector<TransportKind> transports_to_test() {
  std::vector<TransportKind> kinds{TransportKind::mpi};
  if (kOnGpu) {
    kinds.push_back(TransportKind::p2p);
    if (has_nccl_transport()) { kinds.push_back(TransportKind::nccl); }
  }
  return kinds;
}

bool skip_without_gpu(const Communicator& comm) {
  if (!kOnGpu || comm.min(visible_gpus().empty() ? 0 : 1) == 1) { return false; }
  test::skip("no GPU");
  return true;
}

struct Case {
  std::string name;
  Config config;
};

std::vector<Case> cases() {
  Config base;
  base.problem = {2, 701, 6, 3, 40, DType::bf16, false, 1.0};
  base.dtype = DType::bf16;
  base.threads = 1;
  base.backend = kOnGpu ? BackendKind::cuda : BackendKind::cpu;
  base.share_gpu = kOnGpu;
  std::vector<Case> all{{"dense", base}, {"dense causal fp32", base}, {"dilated", base}, {"dilated mean, full ring", base}};
  all[1].config.problem.causal = true;
  all[1].config.dtype = DType::fp32;
  Pattern pattern;
  pattern.branches = {{64, 1}, {300, 3}, {701, 7}};
  pattern.offset = OffsetRule::head;
  pattern.head_split = HeadSplit::all;
  all[2].config.pattern = pattern;
  all[2].config.problem.causal = true;
  pattern.mixing = Mixing::mean;
  all[3].config.pattern = pattern;
  all[3].config.schedule = Schedule::ring_full;
  return all;
}

/// O and LSE of the ranks of this process, rank after rank.
std::string result_of(Session& session) {
  const Problem& problem = session.problem();
  std::string all;
  for (const auto& executor : session.executors()) {
    const std::int64_t rows = executor->plan().local_rows;
    std::vector<std::byte> output(static_cast<std::size_t>(rows * problem.heads * problem.head_dim * size_of(problem.dtype)));
    std::vector<float> lse(static_cast<std::size_t>(rows * problem.heads));
    for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
      executor->read_output(batch, 0, rows, output.data());
      executor->read_lse(batch, 0, rows, lse.data());
      all.append(reinterpret_cast<const char*>(output.data()), output.size());
      all.append(reinterpret_cast<const char*>(lse.data()), lse.size() * sizeof(float));
    }
  }
  return all;
}

std::string run_once(const Config& config, const Communicator& comm) {
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  return result_of(session);
}

}  // namespace

TEST_CASE("every transport gives the bits of as many virtual ranks") {
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  for (const Case& each : cases()) {
    std::string expected;
    if (comm.rank() == 0) {
      Config config = each.config;
      config.virtual_ranks = comm.size();
      config.transport = TransportKind::loopback;
      expected = run_once(config, Communicator::single());
    }
    for (const TransportKind kind : transports_to_test()) {
      Config config = each.config;
      config.transport = kind;

      const std::vector<std::string> parts = comm.gather(run_once(config, comm), 0);

      std::string found;
      for (const std::string& part : parts) { found += part; }
      INFO(each.name << " over " << to_string(kind));
      CHECK(comm.min(comm.rank() != 0 || found == expected ? 1 : 0) == 1);
    }
  }
}

TEST_CASE("segments inside a shard move no byte over any transport") {
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  Config config = cases()[0].config;
  config.problem.seq_len = 256 * comm.size();
  config.pattern.branches = {{32, 1}, {64, 2}, {128, 4}, {256, 8}};
  config.pattern.offset = OffsetRule::head;
  config.pattern.head_split = HeadSplit::all;
  for (const TransportKind kind : transports_to_test()) {
    config.transport = kind;
    const ResolvedConfig resolved = resolve(config, comm);
    Session session(resolved, comm);
    session.load();
    session.run();
    std::int64_t bytes = 0;
    for (const StepTiming& timing : session.executors().front()->timings()) { bytes += timing.bytes_sent + timing.bytes_received; }
    INFO("over " << to_string(kind));
    CHECK(comm.sum(bytes) == 0);
  }
}

TEST_CASE("a hundred repetitions give the same bits") {
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  const Case dilated = cases()[2];
  for (const TransportKind kind : transports_to_test()) {
    Config config = dilated.config;
    config.transport = kind;
    const ResolvedConfig resolved = resolve(config, comm);
    Session session(resolved, comm);
    session.load();
    session.run();
    const std::string first = result_of(session);
    int different = 0;
    for (int i = 1; i < 100; ++i) {
      session.run();
      different += result_of(session) == first ? 0 : 1;
    }
    INFO("over " << to_string(kind));
    CHECK(comm.sum(std::int64_t{different}) == 0);
  }
}

TEST_CASE("memory from the pool and memory from the driver give the same bits") {
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  const Config pooled = cases()[3].config;
  Config unpooled = pooled;
  unpooled.memory_pool = MemoryPooling::off;

  const bool same = run_once(pooled, comm) == run_once(unpooled, comm);

  CHECK(comm.min(same ? 1 : 0) == 1);
}
