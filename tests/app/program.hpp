// SPDX-License-Identifier: Apache-2.0
// The program as its users start it, and what it leaves in a folder.
#pragma once

#include "process.hpp"
#include "text_file.hpp"

#include <functional>
#include <string>
#include <vector>

namespace annulus::test {

/// Runs annulus; see run_process().
ProcessResult annulus_with(std::vector<std::string> arguments, const std::vector<std::string>& environment = {}, double limit_s = 60,
                           const std::function<void(pid_t)>& meanwhile = {});

/// Runs annulus on several ranks.
ProcessResult launch_annulus(int ranks, const std::vector<std::string>& arguments, const std::vector<std::string>& environment = {});

/// Runs a line of bash, in which "$A" is annulus.
ProcessResult run_bash(const std::string& line, const std::vector<std::string>& environment = {}, double limit_s = 60);

/// What makes a run small: 64 rows of 2 heads.
std::vector<std::string> with_small(std::string command, const std::vector<std::string>& more = {});

/// Names in the folder, hidden ones included.
std::vector<std::string> sorted_names(const TemporaryFolder& folder);

}  // namespace annulus::test
