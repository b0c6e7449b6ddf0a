// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/affinity.hpp>
#include <annulus_test.hpp>

#include "program.hpp"

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

using namespace annulus::test;

namespace {

/// The verdict is on CPUs: one GPU for two ranks would be a fault.
const std::vector<std::string> kNoGpu{"CUDA_VISIBLE_DEVICES="};

/// Seconds that anything may take on a machine that is busy with other tests.
constexpr double kPatience = 300;

ProcessResult check_two_ranks(const std::vector<std::string>& flags) {
  std::vector<std::string> command{ANNULUS_LAUNCH, "2", ANNULUS_PROGRAM, "info", "--check"};
  command.insert(command.end(), flags.begin(), flags.end());
  return run_process(command, kPatience, kNoGpu);
}

nlohmann::json fact_named(const nlohmann::json& check, const std::string& name) {
  for (const nlohmann::json& fact : check["facts"]) {
    if (fact["name"] == name) { return fact; }
  }
  return {};
}

bool has_two_cpus() {
  if (annulus::count_of(annulus::allowed_cpus()) >= 2) { return true; }
  skip("two ranks need two CPUs");
  return false;
}

/// Two ranks that may run on the first CPU that this test has, and on no other.
ProcessResult on_one_cpu() {
  return run_bash("cpu=$(taskset -pc $$ | sed 's/.*: *//; s/[,-].*//'); exec taskset -c $cpu '" ANNULUS_LAUNCH "' 2 \"$A\" info --check",
                  kNoGpu);
}

}  // namespace

TEST_CASE("a machine on which ranks reach each other passes, and the rates are told") {
  if (!has_two_cpus()) { return; }

  const ProcessResult text = check_two_ranks({});
  const ProcessResult result = check_two_ranks({"--json"});

  INFO(text.out << text.err << result.err);
  CHECK(text.exit_code == 0);
  CHECK_THAT(text.out, contains_text("\npassed  transport mpi  "));
  CHECK_THAT(text.out, Catch::Matchers::EndsWith("PASS the machine is fit\n"));
  CHECK(result.exit_code == 0);
  const nlohmann::json check = nlohmann::json::parse(result.out)["check"];
  CHECK(check["passed"] == true);
  CHECK(fact_named(check, "mpi")["finding"] == "passed");
  CHECK(fact_named(check, "binding")["finding"] == "passed");
  REQUIRE_FALSE(check["rates"].empty());
  for (const nlohmann::json& rate : check["rates"]) {
    CHECK(rate["wrong_bytes"] == 0);
    CHECK(rate["gbs"] > 0);
    CHECK(rate["copy_gbs"] > 0);
  }
}

TEST_CASE("one process is looked at without MPI") {
  const ProcessResult result = annulus_with({"info", "--check", "--json"}, kNoGpu);

  INFO(result.out << result.err);
  CHECK(result.exit_code == 0);
  const nlohmann::json check = nlohmann::json::parse(result.out)["check"];
  CHECK(fact_named(check, "transports")["finding"] == "absent");
  CHECK(nlohmann::json::parse(annulus_with({"info", "--json"}).out).count("check") == 0);
}

TEST_CASE("ranks that were given one CPU together fail, with exit code 1 and a word of which fact it was") {
  const ProcessResult result = on_one_cpu();

  INFO(result.out << result.err);
  CHECK(result.exit_code == 1);
  CHECK_THAT(result.out, contains_text("\nFAILED  binding        2 ranks on "));
  CHECK_THAT(result.out, contains_text("\nFAIL binding\n"));
}
