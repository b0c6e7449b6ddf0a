// SPDX-License-Identifier: Apache-2.0
// The timeline of a real ring on GPUs: one process is a ring of virtual ranks, several share GPUs over p2p.
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/session/session.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <cstdint>
#include <vector>

using namespace annulus;

TEST_CASE("the transfer of a step starts before the work of the step before it ends") {
  const Communicator& comm = test::world();
  if (comm.min(visible_gpus().empty() ? 0 : 1) == 0) {
    test::skip("no GPU");
    return;
  }
  const bool alone = comm.size() == 1;
  const std::int64_t gpus = std::ssize(visible_gpus());
  if (!alone && gpus > 1 && gpus < comm.host_size()) {
    // A rank that has a GPU to itself is done with its work before one that shares comes to send.
    test::skip("some ranks share a GPU and others do not");
    return;
  }
  const std::int64_t ranks = alone ? 8 : comm.size();
  Config config;
  // Long enough work that ranks which take turns on one GPU get to their transfers meanwhile.
  config.problem = {1, ranks * (alone ? 4096 : 32768), 16, 16, 128, DType::bf16, false, 1.0};
  config.dtype = DType::bf16;
  config.backend = BackendKind::cuda;
  config.share_gpu = true;
  config.transport = alone ? TransportKind::loopback : TransportKind::p2p;
  config.virtual_ranks = alone ? ranks : 1;
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();

  session.run();

  for (const auto& executor : session.executors()) {
    const std::vector<StepTiming> timings = executor->timings();
    REQUIRE(static_cast<std::int64_t>(timings.size()) == ranks);
    for (std::size_t step = 0; step + 1 < timings.size(); ++step) {
      INFO("rank " << executor->plan().rank << ": the work of step " << step << " runs from " << timings[step].work_begin_ms << " to "
                   << timings[step].work_end_ms << " ms, the transfer of step " << step + 1 << " from "
                   << timings[step + 1].transfer_begin_ms << " to " << timings[step + 1].transfer_end_ms << " ms");
      CHECK(timings[step + 1].bytes_received > 0);
      CHECK(timings[step + 1].transfer_begin_ms < timings[step].work_end_ms);
      // Two clocks, and ranks that take turns on one GPU: see CudaClock.
      constexpr double kClocksAgreeMs = 0.05;
      CHECK(timings[step + 1].transfer_end_ms <= timings[step + 1].work_begin_ms + kClocksAgreeMs);
    }
  }
}
