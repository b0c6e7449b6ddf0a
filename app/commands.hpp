// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/config.hpp>
#include <annulus/core/error.hpp>
#include <annulus/job/communicator.hpp>

#include "options.hpp"
#include "sweep.hpp"

#include <string>
#include <vector>

namespace annulus::app {

/// What the user asked for.
struct Invocation {
  Command command = Command::run;
  Config config;               ///< of bench with a sweep: the first row's, with the sweep
  std::vector<BenchRow> rows;  ///< bench: at least one
  bool json = false;
  std::string command_line;
};

/// Runs a command on every rank of `comm`; rank 0 prints the result to standard output. All ranks return the same code.
ExitCode execute(const Invocation& invocation, const Communicator& comm);

}  // namespace annulus::app
