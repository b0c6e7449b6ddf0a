// SPDX-License-Identifier: Apache-2.0
// Names of the Python modules that this program succeeds, as their users know them.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace annulus::app {

/// The preset that an exposed class of theirs, or an alias of one, stands for.
std::optional<std::string_view> preset_of_class(std::string_view name);

/// What replaces a module or class that has no preset of its own, as the end of a sentence that begins with its name; empty for any other
/// name. Takes class names and names of files, with or without .py.
std::string_view replacement_of(std::string_view name);

}  // namespace annulus::app
