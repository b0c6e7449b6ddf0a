// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "commands.hpp"

namespace annulus::app {

/// Requires that all ranks were told the same command and the same options, before anything depends on them. Collective.
/// @throws AgreedError that names the first option that differs, both ranks and both values
void require_same_invocation(const Invocation& invocation, const Communicator& comm);

}  // namespace annulus::app
