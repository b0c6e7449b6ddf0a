// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/session/session.hpp>

namespace annulus {

/// Requires that all ranks resolved their configurations to one problem, read equal inputs, and compute with the same code. Collective.
/// @throws AgreedError that names the first difference, both ranks and both values
void require_same_problem(const ResolvedConfig& resolved, const Communicator& comm);

}  // namespace annulus
