// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

namespace annulus::app {

bool can_stop(Command command) {
  switch (command) {
    case Command::check:
    case Command::bench:
      return true;
    case Command::run:
    case Command::plan:
    case Command::info:
    case Command::generate:
      break;
  }
  return false;
}

ExitCode execute(const Invocation& invocation, const Communicator& comm, StopRequest& stop) {
  switch (invocation.command) {
    case Command::run:
      return execute_run(invocation, comm, stop);
    case Command::check:
      return execute_check(invocation, comm, stop);
    case Command::bench:
      return execute_bench(invocation, comm, stop);
    case Command::info:
      return execute_info(invocation, comm);
    case Command::plan:
    case Command::generate:
      break;
  }
  // These two are one process's work; under a launcher rank 0 does it and the others wait for its verdict.
  ExitCode code = ExitCode::passed;
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    code = invocation.command == Command::plan ? execute_plan(invocation) : execute_generate(invocation);
  });
  return code;
}

}  // namespace annulus::app
