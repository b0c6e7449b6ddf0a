// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "temporary_folder.hpp"

#include <cstdint>
#include <functional>
#include <string>
#include <sys/types.h>
#include <utility>
#include <vector>

namespace annulus::test {

/// What a finished process left.
struct ProcessResult {
  int exit_code = -1;  ///< 128 + signal if one ended it
  std::string out;
  std::string err;
  double seconds = 0;
  bool timed_out = false;
};

/// Runs a program with arguments and extra environment ("NAME=value", or "NAME" to unset), waits at most `limit_s`, then kills its process
/// group. `meanwhile` is called about every 10 ms with its pid while it runs.
ProcessResult run_process(const std::vector<std::string>& arguments, double limit_s, const std::vector<std::string>& environment = {},
                          const std::function<void(pid_t)>& meanwhile = {});

/// Seconds from the time, in milliseconds since 1970, that follows `mark` in `text` until now; negative if `mark` is not there.
double seconds_since(const std::string& text, const std::string& mark);

/// Processes below `ancestor` whose executable is named `name`, ascending by pid.
std::vector<pid_t> descendants_named(pid_t ancestor, const std::string& name);

/// Whether process `pid` has a file open, with or without a name, whose path begins with `prefix`.
bool has_open_file_below(pid_t pid, const std::string& prefix);

/// Value of `name` in the environment of process `pid`; empty if it cannot be read.
std::string environment_of(pid_t pid, const std::string& name);

/// The number in our own environment's `name`, or `otherwise`: how a test is asked for more than it does by itself.
std::int64_t asked_for(const char* name, std::int64_t otherwise);

}  // namespace annulus::test
