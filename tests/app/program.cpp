// SPDX-License-Identifier: Apache-2.0
#include "program.hpp"

#include <algorithm>

namespace annulus::test {

ProcessResult annulus_with(std::vector<std::string> arguments, const std::vector<std::string>& environment, double limit_s,
                           const std::function<void(pid_t)>& meanwhile) {
  arguments.insert(arguments.begin(), ANNULUS_PROGRAM);
  return run_process(arguments, limit_s, environment, meanwhile);
}

ProcessResult launch_annulus(int ranks, const std::vector<std::string>& arguments, const std::vector<std::string>& environment) {
  std::vector<std::string> all{ANNULUS_LAUNCH, std::to_string(ranks), ANNULUS_PROGRAM};
  all.insert(all.end(), arguments.begin(), arguments.end());
  return run_process(all, 60, environment);
}

ProcessResult run_bash(const std::string& line, const std::vector<std::string>& environment, double limit_s) {
  return run_process({"bash", "-c", "A=" ANNULUS_PROGRAM "; export A; " + line}, limit_s, environment);
}

std::vector<std::string> with_small(std::string command, const std::vector<std::string>& more) {
  std::vector<std::string> arguments{std::move(command), "--seq-len", "64", "--heads", "2", "--head-dim", "8", "--threads", "1"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

std::vector<std::string> sorted_names(const TemporaryFolder& folder) {
  std::vector<std::string> names = folder.names();
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace annulus::test
