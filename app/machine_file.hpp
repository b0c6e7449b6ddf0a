// SPDX-License-Identifier: Apache-2.0
// Files of machine constants. Keys, units and what is allowed: configs/machines/README.md.
#pragma once

#include <annulus/plan/machine.hpp>

#include <string>

namespace annulus::app {

/// @throws InvalidArgument naming file, line and key; unknown keys are errors
Machine read_machine(const std::string& path);

/// What read_machine() reads back to the same machine.
std::string to_toml(const Machine& machine);

}  // namespace annulus::app
