// SPDX-License-Identifier: Apache-2.0
#include <annulus_test.hpp>

#include "process.hpp"

#include <filesystem>
#include <signal.h>
#include <string>

using namespace annulus::test;

namespace {

/// Runs tests/app/fault_program on four ranks. Faults: see there.
ProcessResult run_faulty(const std::string& fault, int rank, int step, const std::string& timeout, const std::string& output,
                         double limit_s) {
  return run_process({ANNULUS_LAUNCH, "4", ANNULUS_FAULT_PROGRAM, std::to_string(rank), std::to_string(step), fault, timeout, output},
                     limit_s);
}

bool folder_is_empty(const TemporaryFolder& folder) { return std::filesystem::is_empty(folder.path()); }

}  // namespace

TEST_CASE("the ring that is not disturbed writes its result") {
  const TemporaryFolder folder;
  const ProcessResult result = run_faulty("none", 0, 0, "30", folder / "out.h5", 60);
  INFO(result.err);
  CHECK(result.exit_code == 0);
  CHECK(std::filesystem::exists(folder / "out.h5"));
}

TEST_CASE("a killed rank ends the job within ten seconds and leaves no result") {
  for (const int step : {1, 3}) {
    const TemporaryFolder folder;
    const ProcessResult result = run_faulty("kill", 1, step, "300", folder / "out.h5", 30);
    INFO(result.err);
    CHECK(result.exit_code != 0);
    CHECK_FALSE(result.timed_out);
    CHECK(result.seconds < 10);
    CHECK(folder_is_empty(folder));
  }
}

TEST_CASE("an exception in one rank's step ends the job with exit code 3 and names rank and step") {
  for (const int rank : {0, 3}) {
    const TemporaryFolder folder;
    const ProcessResult result = run_faulty("throw", rank, 2, "300", folder / "out.h5", 30);
    INFO(result.err);
    CHECK(result.exit_code == 3);
    CHECK(result.seconds < 10);
    CHECK(result.err.find("annulus: rank " + std::to_string(rank)) != std::string::npos);
    CHECK(result.err.find("step 2: an injected failure") != std::string::npos);
    CHECK(folder_is_empty(folder));
  }
}

TEST_CASE("a stopped rank is named by the abort, every time") {
  for (int run = 0; run < 20; ++run) {
    const TemporaryFolder folder;
    const ProcessResult result = run_faulty("stop", 2, 1 + run % 3, "1", folder / "out.h5", 40);
    INFO("run " << run << "\n" << result.err);
    CHECK(result.exit_code == 3);
    CHECK_FALSE(result.timed_out);
    CHECK(result.err.find("no answer from rank 2") != std::string::npos);
    CHECK(result.err.find("step") != std::string::npos);
    for (const char* innocent : {"no answer from rank 0", "no answer from rank 1", "no answer from rank 3"}) {
      CHECK(result.err.find(innocent) == std::string::npos);
    }
    CHECK(folder_is_empty(folder));
  }
}

TEST_CASE("a message that never comes ends the job although every rank is alive") {
  const TemporaryFolder folder;
  const ProcessResult result = run_faulty("lose", 1, 2, "1", folder / "out.h5", 40);
  INFO(result.err);
  CHECK(result.exit_code == 3);
  CHECK_FALSE(result.timed_out);
  CHECK(result.err.find("wait for each other") != std::string::npos);
  CHECK(folder_is_empty(folder));
}
