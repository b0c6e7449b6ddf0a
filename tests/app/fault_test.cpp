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

/// What the watchdog says at the end of a job with a fault and a timeout of one second, which must end with exit code 3 and no result.
std::string last_words(const std::string& fault, int rank, int step) {
  const TemporaryFolder folder;
  const ProcessResult result = run_faulty(fault, rank, step, "1", folder / "out.h5", 40);
  INFO(result.err);
  CHECK(result.exit_code == 3);
  CHECK_FALSE(result.timed_out);
  CHECK(folder_is_empty(folder));
  return result.err;
}

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
    const std::string words = last_words("stop", 2, 1 + run % 3);
    INFO("run " << run << "\n" << words);
    CHECK(words.find("no answer from rank 2") != std::string::npos);
    CHECK(words.find("step") != std::string::npos);
    for (const char* innocent : {"no answer from rank 0", "no answer from rank 1", "no answer from rank 3"}) {
      CHECK(words.find(innocent) == std::string::npos);
    }
  }
}

TEST_CASE("a stopped rank ends the job within the timeout") {
  constexpr int kTimeout = 12;
  const TemporaryFolder folder;
  const ProcessResult result = run_faulty("stop", 2, 2, std::to_string(kTimeout), folder / "out.h5", 60);
  const double after = seconds_since(result.err, "fault at ");
  INFO(after << " s after the fault\n" << result.err);
  CHECK(result.exit_code == 3);
  CHECK(after > kTimeout / 2);
  CHECK(after < kTimeout);
}

TEST_CASE("a message that never comes ends the job although every rank is alive") {
  const std::string words = last_words("lose", 1, 2);
  INFO(words);
  CHECK(words.find("wait for each other") != std::string::npos);
}

TEST_CASE("a stopped rank is named though the others stand in their own work with transfers open") {
  const std::string words = last_words("stop-unseen", 2, 1);
  INFO(words);
  CHECK(words.find("no answer from rank 2") != std::string::npos);
}

TEST_CASE("work that lasts for several timeouts with transfers open is not a fault") {
  const TemporaryFolder folder;
  const ProcessResult result = run_faulty("slow", 0, 1, "0.2", folder / "out.h5", 60);
  INFO(result.err);
  CHECK(result.exit_code == 0);
  CHECK(std::filesystem::exists(folder / "out.h5"));
}
