// SPDX-License-Identifier: Apache-2.0
// Faults of ranks that share GPUs. Runs on one GPU.
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/transport/gpu_transports.hpp>
#include <annulus_test.hpp>

#include "process.hpp"

#include <filesystem>
#include <string>
#include <sys/types.h>
#include <vector>

using namespace annulus;
using namespace annulus::test;

namespace {

std::vector<std::string> transports_to_test() {
  std::vector<std::string> names{"p2p", "mpi"};
  if (has_nccl_transport()) { names.emplace_back("nccl"); }
  return names;
}

bool skip_without_gpu() {
  if (!visible_gpus().empty()) { return false; }
  skip("no GPU");
  return true;
}

/// Runs tests/app/fault_program on three ranks that share GPUs; the processes it had, all of which should be gone at the end, go to
/// `started`.
ProcessResult run_faulty(const std::string& fault, int step, const std::string& timeout, const std::string& transport,
                         const std::string& output, std::vector<pid_t>& started) {
  return run_process({ANNULUS_LAUNCH, "3", ANNULUS_FAULT_PROGRAM, "1", std::to_string(step), fault, timeout, output, "cuda", transport}, 90,
                     {}, [&](pid_t launcher) {
                       const std::vector<pid_t> now = descendants_named(launcher, "fault_program");
                       if (now.size() > started.size()) { started = now; }
                     });
}

bool all_gone(const std::vector<pid_t>& processes) {
  for (const pid_t process : processes) {
    if (std::filesystem::exists("/proc/" + std::to_string(process) + "/exe")) { return false; }
  }
  return !processes.empty();
}

}  // namespace

TEST_CASE("ranks that share a GPU and are not disturbed write their result") {
  const std::string transport = GENERATE(from_range(transports_to_test()));
  if (skip_without_gpu()) { return; }
  const TemporaryFolder folder;
  std::vector<pid_t> started;

  const ProcessResult result = run_faulty("none", 0, "60", transport, folder / "out.h5", started);

  INFO("transport " << transport << "\n" << result.err);
  CHECK(result.exit_code == 0);
  CHECK(std::filesystem::exists(folder / "out.h5"));
  CHECK(all_gone(started));
}

TEST_CASE("a killed rank ends a job on GPUs and leaves neither result nor process") {
  const std::string transport = GENERATE(from_range(transports_to_test()));
  if (skip_without_gpu()) { return; }
  const TemporaryFolder folder;
  std::vector<pid_t> started;

  const ProcessResult result = run_faulty("kill", 2, "300", transport, folder / "out.h5", started);
  const double after = seconds_since(result.err, "fault at ");

  INFO("transport " << transport << ", " << after << " s\n" << result.err);
  CHECK(result.exit_code != 0);
  CHECK_FALSE(result.timed_out);
  CHECK(after >= 0);
  CHECK(after < 10);
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK(all_gone(started));
}

TEST_CASE("a stopped rank of a job on GPUs is the one that the abort names") {
  const std::string transport = GENERATE(from_range(transports_to_test()));
  const int step = GENERATE(1, 2);
  if (skip_without_gpu()) { return; }
  const TemporaryFolder folder;
  std::vector<pid_t> started;

  constexpr int kTimeout = 10;
  const ProcessResult result = run_faulty("stop", step, std::to_string(kTimeout), transport, folder / "out.h5", started);
  const double after = seconds_since(result.err, "fault at ");

  INFO("transport " << transport << ", step " << step << ", " << after << " s\n" << result.err);
  CHECK(after >= 0);
  CHECK(after < kTimeout);
  CHECK(result.exit_code == 3);
  CHECK_FALSE(result.timed_out);
  CHECK(result.err.find("no answer from rank 1") != std::string::npos);
  CHECK(result.err.find("step") != std::string::npos);
  for (const char* innocent : {"no answer from rank 0", "no answer from rank 2"}) { CHECK(result.err.find(innocent) == std::string::npos); }
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK(all_gone(started));
}
