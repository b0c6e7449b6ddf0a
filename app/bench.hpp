// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "commands.hpp"

namespace annulus::app {

/// `annulus bench`: checks and times every row of `invocation`, prints a table or JSON, and writes CSV and HDF5. Collective.
ExitCode execute_bench(const Invocation& invocation, const Communicator& comm);

}  // namespace annulus::app
