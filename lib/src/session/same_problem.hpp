// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/job/agreement.hpp>
#include <annulus/session/session.hpp>

#include <vector>

namespace annulus {

/// What shapes the plan or the numbers, by the names of the options. Threads and the timeout do neither, and nodes may differ in them.
std::vector<Fact> facts_of(const ResolvedConfig& resolved);

/// Requires that all ranks resolved their configurations to one problem, read equal inputs, and compute with the same code. Collective.
/// @throws AgreedError that names the first difference, both ranks and both values
void require_same_problem(const ResolvedConfig& resolved, const Communicator& comm);

}  // namespace annulus
