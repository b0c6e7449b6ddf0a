// SPDX-License-Identifier: Apache-2.0
// Reports that could not be written.
#include <annulus_test.hpp>

#include "program.hpp"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

using namespace annulus::test;

namespace {

const std::vector<std::string> kReports{
    "--help",
    "--version",
    "run --help",
    "run --print-config",
    "info",
    "info --json",
    "plan --seq-len 64",
    "plan --seq-len 64 --json",
    "check --seq-len 64 --heads 2 --head-dim 8 --threads 1",
    "check --seq-len 64 --heads 2 --head-dim 8 --threads 1 --json",
    "run --seq-len 64 --heads 2 --head-dim 8 --threads 1",
    "run --seq-len 64 --heads 2 --head-dim 8 --threads 1 --json",
    "bench --seq-len 64 --heads 2 --head-dim 8 --threads 1 --repetitions 1",
    "bench --seq-len 64 --heads 2 --head-dim 8 --threads 1 --repetitions 1 --json --sweep causal=false,true",
};

}  // namespace

TEST_CASE("every report on a full or closed standard output ends with exit code 3 and the reason") {
  for (const std::string& report : kReports) {
    const ProcessResult full = run_bash("exec \"$A\" " + report + " > /dev/full");
    INFO(report << "\n" << full.err);
    CHECK(full.exit_code == 3);
    CHECK(full.err == "annulus: standard output cannot be written: No space left on device\n");
    const ProcessResult closed = run_bash("exec \"$A\" " + report + " >&-");
    INFO(closed.err);
    CHECK(closed.exit_code == 3);
    CHECK(closed.err == "annulus: standard output cannot be written: Bad file descriptor\n");
  }
}

TEST_CASE("so it does under a launcher, told once") {
  const std::vector<std::pair<const char*, const char*>> launches{
      {"3", "check --seq-len 64 --heads 2 --head-dim 8 --threads 1"},
      {"2", "bench --seq-len 64 --heads 2 --head-dim 8 --threads 1 --repetitions 1"},
      {"2", "info"},
      {"3", "plan --seq-len 64"},
  };
  for (const auto& [ranks, report] : launches) {
    const std::string line = "exec " ANNULUS_PROGRAM " " + std::string(report) + " > /dev/full";
    const ProcessResult result = run_process({ANNULUS_LAUNCH, ranks, "bash", "-c", line}, 60);
    INFO(report << "\n" << result.err);
    CHECK(result.exit_code == 3);
    const std::string reason = "standard output cannot be written: No space left on device";
    const std::size_t first = result.err.find(reason);
    CHECK(first != std::string::npos);
    CHECK(result.err.find(reason, first + 1) == std::string::npos);
  }
}

TEST_CASE("a file that reaches its limit in the middle of a JSON document ends with exit code 3") {
  const TemporaryFolder folder;
  const std::string whole = annulus_with({"plan", "--seq-len", "64", "--ranks", "64", "--json"}).out;
  REQUIRE(whole.size() > 4096);
  const ProcessResult result = run_bash("ulimit -f 4; exec \"$A\" plan --seq-len 64 --ranks 64 --json > '" + (folder / "plan.json") + "'");
  INFO(result.err);
  CHECK(result.exit_code == 3);
  CHECK(result.err.find("standard output cannot be written: File too large") != std::string::npos);
}

TEST_CASE("the result file is written although nobody can read the report") {
  const TemporaryFolder folder;
  const ProcessResult result =
      run_bash("exec \"$A\" run --seq-len 64 --heads 2 --head-dim 8 --threads 1 --output '" + (folder / "o.h5") + "' > /dev/full");
  CHECK(result.exit_code == 3);
  CHECK(sorted_names(folder) == std::vector<std::string>{"o.h5"});
}

TEST_CASE("standard descriptors that the parent closed never become a file of ours") {
  const TemporaryFolder folder;
  const ProcessResult usual = annulus_with(with_small("run", {"--output", folder / "usual.h5"}));
  const ProcessResult bare =
      run_bash("exec \"$A\" run --seq-len 64 --heads 2 --head-dim 8 --threads 1 --output '" + (folder / "bare.h5") + "' <&- >&- 2>&-");
  CHECK(usual.exit_code == 0);
  CHECK(bare.exit_code == 3);
  CHECK(read_text(folder / "bare.h5").find("seq-len 64, heads") == std::string::npos);
  CHECK(annulus_with({"run", "--input", folder / "bare.h5"}).exit_code == 2);  // a result is no input, but a whole HDF5 file
}

TEST_CASE("messages that cannot be written do not change the exit code") {
  CHECK(run_bash("exec \"$A\" run --heads 0 2>/dev/full").exit_code == 2);
  CHECK(run_bash("exec \"$A\" run --heads 0 2>&-").exit_code == 2);
  CHECK(run_bash("exec \"$A\" run --seq-len 20 --heads 1 --scale 1e300 2>/dev/full").exit_code == 1);
}

TEST_CASE("a slow reader of a pipe that does not block gets everything") {
  // The pipe holds 64 KiB and the document is larger.
  const ProcessResult result = run_bash(
      "perl -MFcntl -e 'fcntl(STDOUT, F_SETFL, fcntl(STDOUT, F_GETFL, 0) | O_NONBLOCK); exec @ARGV' \"$A\" plan --seq-len 4096 --ranks 600 "
      "--json | { sleep 1; wc -c; }; exit \"${PIPESTATUS[0]}\"");
  INFO(result.err);
  CHECK(result.exit_code == 0);
  CHECK(std::stol(result.out) > 100000);
}
