// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/config.hpp>
#include <annulus/core/error.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/job/stop_request.hpp>

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

/// Whether a command has places at which a job can stop and be gone on with later.
bool can_stop(Command command);

/// Runs a command on every rank of `comm`; rank 0 prints the result to standard output. All ranks return the same code: ExitCode::stopped
/// if they agreed to stop, and work is left.
ExitCode execute(const Invocation& invocation, const Communicator& comm, StopRequest& stop);

// One for each command, in a file of its name. Collective, but for those that take no communicator.

/// One attention; prints its timings, and writes the result where there is an --output.
ExitCode execute_run(const Invocation& invocation, const Communicator& comm, StopRequest& stop);
/// Compares with the oracle, case after case.
ExitCode execute_check(const Invocation& invocation, const Communicator& comm, StopRequest& stop);
/// Checks and times every row of `invocation`, prints a table or JSON, and writes CSV and HDF5.
ExitCode execute_bench(const Invocation& invocation, const Communicator& comm, StopRequest& stop);
/// What this binary has, what the machine has, and which rank runs where.
ExitCode execute_info(const Invocation& invocation, const Communicator& comm);
/// What the plans of all ranks come to, without a job.
ExitCode execute_plan(const Invocation& invocation);
/// Writes a random input file.
ExitCode execute_generate(const Invocation& invocation);

}  // namespace annulus::app
