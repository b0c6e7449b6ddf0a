// SPDX-License-Identifier: Apache-2.0
// Ranks of the real program that fail, or seem to, on their own.
#include <annulus_test.hpp>

#include "process.hpp"

#include <string>
#include <vector>

using annulus::test::contains_text;
using annulus::test::ProcessResult;
using annulus::test::run_process;

TEST_CASE("what only one rank meets ends the job and names the rank, whatever kind of exception it is") {
  // The formatting library throws the standard library's error when a full device refuses more than a buffer of output.
  const std::string program = ANNULUS_PROGRAM;
  const ProcessResult result =
      run_process({ANNULUS_LAUNCH, "2", "bash", "-c", "exec " + program + " check --cases 40 --backend reference > /dev/full"}, 100);
  INFO(result.err);
  CHECK(result.exit_code == 3);
  CHECK_THAT(result.err, contains_text("annulus: rank 0 ("));
  CHECK_THAT(result.err, contains_text("No space left on device"));
}

TEST_CASE("a rank that computes for many timeouts while another waits for it is not ended") {
  // Under the causal mask rank 1 has three times the work of rank 0.
  const ProcessResult result = run_process({ANNULUS_LAUNCH, "2", ANNULUS_PROGRAM, "run", "--backend", "reference", "--causal", "--seq-len",
                                            "10000", "--heads", "1", "--head-dim", "64", "--timeout", "0.5"},
                                           100);
  INFO(result.err);
  CHECK(result.exit_code == 0);
}
