// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "options.hpp"

#include <string>

namespace annulus::app {

/// Applies a TOML file: flat keys, named like the flags. Unknown keys and wrong types are refused with file and line.
/// @throws InvalidArgument
void apply_file(Draft& draft, const std::string& path);

/// Path of a preset's file, beside an installed program or in the source tree. @throws InvalidArgument with the presets that exist
std::string preset_path(const std::string& name);

/// The options of `command` as TOML that reads back to the same.
std::string to_toml(const Config& config, Command command);

}  // namespace annulus::app
