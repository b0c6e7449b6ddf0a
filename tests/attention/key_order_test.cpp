// SPDX-License-Identifier: Apache-2.0
// The promise of KeyOrder::cyclic: the bits of one rank on any number of ranks whose shards are whole blocks, over whatever transport.
// Built once for the backends on the CPU and once for kernel fused.
#include <annulus/attention/attention_kernel.hpp>
#include <annulus/core/error.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/session/session.hpp>
#include <annulus/transport/gpu_transports.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

using namespace annulus;

namespace {

const bool kOnGpu = std::string(ANNULUS_TEST_BACKEND) == "cuda";

std::vector<BackendKind> backends() {
  return kOnGpu ? std::vector<BackendKind>{BackendKind::cuda} : std::vector<BackendKind>{BackendKind::cpu, BackendKind::reference};
}

std::vector<TransportKind> transports() {
  std::vector<TransportKind> kinds{TransportKind::mpi};
  if (kOnGpu) { kinds.push_back(TransportKind::p2p); }
  if (kOnGpu && has_nccl_transport()) { kinds.push_back(TransportKind::nccl); }
  return kinds;
}

bool skipped() {
  if (!kOnGpu || test::world().min(sees_only_hopper() ? 1 : 0) == 1) { return false; }
  test::skip("no Hopper GPU");
  return true;
}

struct Case {
  std::string name;
  Config config;
};

/// @param unit tokens of which the length is a multiple
std::vector<Case> cases(BackendKind backend, std::int64_t unit) {
  Config base;
  const std::int64_t head_dim = backend == BackendKind::cuda ? 72 : backend == BackendKind::cpu ? 20 : 4;
  base.problem = {2, unit, 2, 1, head_dim, DType::bf16, false, 1.0};
  base.dtype = DType::bf16;
  base.threads = 2;
  base.backend = backend;
  if (backend == BackendKind::cuda) { base.kernel = KernelKind::fused; }
  base.share_gpu = backend == BackendKind::cuda;
  std::vector<Case> all{{"dense", base},
                        {"causal", base},
                        {"dense, ring-full", base},
                        {"LongNet", base},
                        {"LongNet causal mean", base},
                        {"LongNet with keys of zeros", base}};
  all[1].config.problem.causal = true;
  all[1].config.dtype = backend == BackendKind::cuda ? DType::fp16 : DType::fp32;
  all[2].config.schedule = Schedule::ring_full;
  Pattern pattern;
  pattern.branches = {{unit / 4, 1}, {unit, 2}};
  pattern.offset = OffsetRule::head;
  pattern.head_split = HeadSplit::all;
  all[3].config.pattern = pattern;
  pattern.mixing = Mixing::mean;
  all[4].config.pattern = pattern;
  all[4].config.problem.causal = true;
  pattern.mixing = Mixing::lse;
  pattern.branches = {{unit / 4 * 3, 1}, {unit, 2}};
  pattern.ragged = Ragged::zero_keys;
  all[5].config.pattern = pattern;
  const auto add = [&](const std::string& name, bool causal, PartitionKind partition, Schedule schedule) -> Config& {
    Config& config = all.emplace_back(Case{name, base}).config;
    config.problem.causal = causal;
    config.partition = partition;
    config.schedule = schedule;
    return config;
  };
  add("dense, direct", false, PartitionKind::contiguous, Schedule::direct);
  add("dense, allgather", false, PartitionKind::contiguous, Schedule::allgather);
  add("causal, zigzag, direct", true, PartitionKind::zigzag, Schedule::direct);
  add("causal, zigzag, allgather", true, PartitionKind::zigzag, Schedule::allgather);
  Config& branches = add("causal branches, zigzag, direct", true, PartitionKind::zigzag, Schedule::direct);
  branches.pattern.branches = {{unit / 4, 1}, {unit, 1}};
  branches.pattern.head_split = HeadSplit::all;
  // Branch 1 has tokens 1, 3, .. and, as the last of them is past its end, token 0.
  for (const auto& [name, causal, partition, schedule] :
       {std::tuple("wrapped", false, PartitionKind::contiguous, Schedule::ring),
        std::tuple("wrapped, ring-full", false, PartitionKind::contiguous, Schedule::ring_full),
        std::tuple("wrapped, direct", false, PartitionKind::contiguous, Schedule::direct),
        std::tuple("wrapped causal", true, PartitionKind::contiguous, Schedule::ring),
        std::tuple("wrapped causal, zigzag, direct", true, PartitionKind::zigzag, Schedule::direct)}) {
    Config& wrapped = add(name, causal, partition, schedule);
    wrapped.pattern.branches = {{unit / 4, 1}, {unit - 1, 2}};
    wrapped.pattern.head_split = HeadSplit::all;
    wrapped.pattern.ragged = Ragged::wrap;
  }
  for (const bool causal : {false, true}) {
    Config& hidden = add(causal ? "hidden keys, causal" : "hidden keys", causal, PartitionKind::contiguous, Schedule::ring);
    hidden.pattern.branches = {{unit / 4, 1}, {unit, 2}};
    hidden.pattern.head_split = HeadSplit::all;
    hidden.problem.kv_lengths = {unit / 2 + 37, 5};
  }
  for (const auto& [name, mixing, causal, partition, schedule] :
       {std::tuple("extra keys", Mixing::lse, false, PartitionKind::contiguous, Schedule::ring),
        std::tuple("extra keys, mean", Mixing::mean, false, PartitionKind::contiguous, Schedule::direct),
        std::tuple("extra keys, causal, zigzag, direct", Mixing::sum, true, PartitionKind::zigzag, Schedule::direct)}) {
    Config& extra = add(name, causal, partition, schedule);
    extra.problem.extra_keys = 131;  // more than a tile of keys of any kernel
    extra.pattern.branches = {{unit / 4, 1}, {unit, 2}};
    extra.pattern.head_split = partition == PartitionKind::zigzag ? HeadSplit::first : HeadSplit::all;
    extra.pattern.mixing = mixing;
  }
  add("extra keys, dense", false, PartitionKind::contiguous, Schedule::ring).problem.extra_keys = 2;
  return all;
}

/// O and LSE of the whole sequence, [batch][O, then LSE head by head]; zeros where rows are of ranks in other processes.
std::vector<std::string> result_of(const Config& config, const Communicator& comm) {
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  const Problem& problem = session.problem();
  std::vector<std::string> parts;
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    for (std::int64_t head = -1; head < problem.heads; ++head) {  // -1: all of O, then LSE head by head
      const std::int64_t row_bytes =
          head < 0 ? problem.heads * problem.head_dim * size_of(problem.dtype) : static_cast<std::int64_t>(sizeof(float));
      std::string& part = parts.emplace_back(static_cast<std::size_t>(problem.seq_len * row_bytes), '\0');
      for (const auto& executor : session.executors()) {
        const std::int64_t rows = executor->plan().local_rows;
        std::vector<std::byte> output(static_cast<std::size_t>(rows * problem.heads * problem.head_dim * size_of(problem.dtype)));
        std::vector<float> lse(static_cast<std::size_t>(rows * problem.heads));
        executor->read_output(batch, 0, rows, output.data());
        executor->read_lse(batch, 0, rows, lse.data());
        const auto* const from =
            head < 0 ? reinterpret_cast<const char*>(output.data()) : reinterpret_cast<const char*>(lse.data() + head * rows);
        for (const ShardPiece& piece : executor->plan().shard.pieces) {
          std::copy_n(from + piece.local_first * row_bytes, piece.global.count * row_bytes, part.data() + piece.global.first * row_bytes);
        }
      }
    }
  }
  return parts;
}

Config on_virtual_ranks(Config config, std::int64_t ranks) {
  config.virtual_ranks = ranks;
  config.transport = ranks > 1 ? TransportKind::loopback : TransportKind::self;
  return config;
}

}  // namespace

TEST_CASE("2, 4 and 16 virtual ranks give the bits of one rank where shards are whole blocks") {
  if (skipped() || test::world().rank() != 0) { return; }
  const Communicator comm = Communicator::single();
  for (const BackendKind backend : backends()) {
    // Blocks of 256 rows of rate 2 on 16 ranks; the plain loops take a quarter of that.
    const std::int64_t most = backend == BackendKind::reference ? 4 : 16;
    for (const Case& each : cases(backend, most * 512)) {
      const std::vector<std::string> one = result_of(on_virtual_ranks(each.config, 1), comm);
      for (std::int64_t ranks = 2; ranks <= most; ranks *= ranks == 4 ? 4 : 2) {
        INFO(to_string(backend) << " " << each.name << " on " << ranks << " ranks");
        CHECK(result_of(on_virtual_ranks(each.config, ranks), comm) == one);
      }
    }
  }
}

TEST_CASE("as many ranks over every transport give the bits of one rank where shards are whole blocks") {
  if (skipped()) { return; }
  const Communicator& comm = test::world();
  for (const BackendKind backend : backends()) {
    for (const Case& each : cases(backend, comm.size() * 1024)) {
      std::vector<std::string> expected;
      if (comm.rank() == 0) { expected = result_of(on_virtual_ranks(each.config, 1), Communicator::single()); }
      for (const TransportKind kind : transports()) {
        Config config = each.config;
        config.transport = comm.size() > 1 ? kind : TransportKind::self;

        const std::vector<std::string> own = result_of(config, comm);

        std::vector<std::string> all;
        for (const std::string& part : own) {
          std::string& together = all.emplace_back(part.size(), '\0');
          for (const std::string& one : comm.gather(part, 0)) {
            for (std::size_t i = 0; i < one.size(); ++i) { together[i] = static_cast<char>(together[i] | one[i]); }
          }
        }
        if (comm.rank() != 0) { continue; }
        INFO(to_string(backend) << " " << each.name << " over " << to_string(kind));
        CHECK(all == expected);
      }
    }
  }
}

TEST_CASE("a sequence gives the same bits alone and in a batch") {
  if (skipped() || test::world().rank() != 0) { return; }
  const Communicator comm = Communicator::single();
  for (const BackendKind backend : backends()) {
    for (const Case& each : cases(backend, 1024)) {
      Config alone = each.config;
      alone.problem.batch = 1;
      if (!alone.problem.kv_lengths.empty()) { alone.problem.kv_lengths.pop_back(); }  // that of the second entry
      const std::vector<std::string> batch = result_of(on_virtual_ranks(each.config, 1), comm);
      const std::vector<std::string> first = result_of(on_virtual_ranks(alone, 2), comm);
      INFO(to_string(backend) << " " << each.name);
      CHECK(std::vector<std::string>(batch.begin(), batch.begin() + std::ssize(first)) == first);
    }
  }
}

TEST_CASE("threads do not change the bits") {
  if (kOnGpu) { return; }
  if (test::world().rank() != 0) { return; }
  const Communicator comm = Communicator::single();
  for (Case& each : cases(BackendKind::cpu, 1536)) {
    const std::vector<std::string> two = result_of(on_virtual_ranks(each.config, 3), comm);
    each.config.threads = 1;
    INFO(each.name);
    CHECK(result_of(on_virtual_ranks(each.config, 3), comm) == two);
  }
}

TEST_CASE("an order of keys that a kernel does not keep is refused with the reason") {
  Config config = cases(BackendKind::cpu, 1024).front().config;
  config.partition = PartitionKind::contiguous;
  config.schedule = Schedule::ring;
  config.key_order = KeyOrder::cyclic;
  CHECK(routing_of(config) == Routing{Schedule::ring, KeyOrder::cyclic, 256});
  config.tile_rows = 32;
  CHECK(routing_of(config).block_rows == 256);
  config.tile_rows = 100;
  CHECK_THROWS_WITH(routing_of(config), test::contains_text("--tile-rows 100 takes keys in the order in which they come"));
  config.tile_rows = 0;
  config.backend = BackendKind::cuda;
  config.kernel = KernelKind::fused;
  CHECK(routing_of(config) == Routing{Schedule::ring, KeyOrder::cyclic, 128});
  config.kernel = KernelKind::cublas;
  CHECK_THROWS_WITH(routing_of(config), test::contains_text("kernel cublas takes keys in the order in which they come"));
  config.key_order = KeyOrder::automatic;
  CHECK(routing_of(config) == Routing{Schedule::ring, KeyOrder::arrival, 0});
  config.backend = BackendKind::reference;
  CHECK(routing_of(config) == Routing{Schedule::ring, KeyOrder::cyclic, 256});
}
