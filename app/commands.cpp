// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

namespace annulus::app {

ExitCode execute(const Invocation& invocation, const Communicator& comm) {
  switch (invocation.command) {
    case Command::run:
      return execute_run(invocation, comm);
    case Command::check:
      return execute_check(invocation, comm);
    case Command::bench:
      return execute_bench(invocation, comm);
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
