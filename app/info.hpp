// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "commands.hpp"

namespace annulus::app {

/// `annulus info`: what this binary has, what the machine has, and which rank runs where. Collective.
ExitCode execute_info(const Invocation& invocation, const Communicator& comm);

}  // namespace annulus::app
