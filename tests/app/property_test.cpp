// SPDX-License-Identifier: Apache-2.0
// The program checks itself: random problems on virtual ranks and on processes, and the sample of real data.
#include <annulus_test.hpp>

#include "process.hpp"

#include <string>
#include <vector>

using namespace annulus::test;

namespace {

/// `annulus check` on `ranks` processes (0: this one alone, not launched).
ProcessResult check_on(int ranks, const std::vector<std::string>& flags) {
  std::vector<std::string> arguments;
  if (ranks > 0) { arguments = {ANNULUS_LAUNCH, std::to_string(ranks)}; }
  arguments.insert(arguments.end(), {ANNULUS_PROGRAM, "check", "--threads", "1"});
  arguments.insert(arguments.end(), flags.begin(), flags.end());
  return run_process(arguments, 500);
}

void expect_pass(const ProcessResult& result) {
  std::string failures;
  for (std::size_t at = result.out.find("FAIL"); at != std::string::npos; at = result.out.find("FAIL", at + 1)) {
    failures += result.out.substr(at, result.out.find('\n', at) - at) + "\n";
  }
  INFO(failures << result.err);
  CHECK(result.exit_code == 0);
  CHECK(failures.empty());
}

}  // namespace

TEST_CASE("500 random problems on 1 to 16 virtual ranks agree with the oracle, seed 1") {
  const ProcessResult result = check_on(0, {"--cases", "500", "--seed", "1"});
  expect_pass(result);
  CHECK(result.out.find("500 cases, 0 failed") != std::string::npos);
}

TEST_CASE("500 random problems on the reference backend agree with the oracle, seed 2") {
  expect_pass(check_on(0, {"--cases", "500", "--seed", "2", "--backend", "reference"}));
}

TEST_CASE("500 random problems on each of 1, 2, 3 and 4 processes agree with the oracle, seeds 11 to 14") {
  for (int ranks = 1; ranks <= 4; ++ranks) {
    INFO(ranks << " ranks");
    expect_pass(check_on(ranks, {"--cases", "500", "--seed", std::to_string(10 + ranks), "--transport", ranks == 1 ? "self" : "mpi"}));
  }
}

TEST_CASE("gradients of 500 random problems on 1 to 16 virtual ranks agree with the oracle, seed 21") {
  const ProcessResult result = check_on(0, {"--gradients", "--cases", "500", "--seed", "21"});
  expect_pass(result);
  CHECK(result.out.find("500 cases, 0 failed") != std::string::npos);
}

TEST_CASE("gradients of 200 random problems on the reference backend agree with the oracle, seed 22") {
  expect_pass(check_on(0, {"--gradients", "--cases", "200", "--seed", "22", "--backend", "reference"}));
}

TEST_CASE("gradients of 100 random problems on each of 1, 2, 3 and 4 processes agree with the oracle, seeds 31 to 34") {
  for (int ranks = 1; ranks <= 4; ++ranks) {
    INFO(ranks << " ranks");
    expect_pass(check_on(
        ranks, {"--gradients", "--cases", "100", "--seed", std::to_string(30 + ranks), "--transport", ranks == 1 ? "self" : "mpi"}));
  }
}

TEST_CASE("gradients on real attention data pass in every dtype, on processes and virtual ranks") {
  const std::string input = ANNULUS_TEST_DATA "/attention_sample.h5";
  for (const char* dtype : {"fp32", "bf16"}) {
    const std::vector<std::string> flags{"--gradients", "--input",      input, "--dtype",           dtype,           "--causal",
                                         "true",        "--rows",       "48",  "--segment-lengths", "300,1000,3000", "--dilation-rates",
                                         "1,3,5",       "--head-split", "all", "--offset",          "head"};
    INFO(dtype);
    expect_pass(check_on(3, flags));
    std::vector<std::string> virtual_flags = flags;
    virtual_flags.insert(virtual_flags.end(), {"--virtual-ranks", "16"});
    expect_pass(check_on(0, virtual_flags));
  }
}

TEST_CASE("real attention data passes in every dtype, on processes and virtual ranks, causal and not") {
  const std::string input = ANNULUS_TEST_DATA "/attention_sample.h5";
  const std::vector<std::string> pattern{"--segment-lengths", "300,1000,3000", "--dilation-rates", "1,3,5", "--head-split", "all",
                                         "--offset",          "head",          "--rows",           "64"};
  for (const char* dtype : {"fp32", "fp16", "bf16"}) {
    for (const char* causal : {"true", "false"}) {
      std::vector<std::string> flags{"--input", input, "--dtype", dtype, "--causal", causal};
      INFO(dtype << " causal " << causal);
      expect_pass(check_on(4, flags));
      flags.insert(flags.end(), pattern.begin(), pattern.end());
      expect_pass(check_on(3, flags));
      flags.insert(flags.end(), {"--virtual-ranks", "16"});
      expect_pass(check_on(0, flags));
    }
  }
}
