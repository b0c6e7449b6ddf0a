// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "options.hpp"

#include <string>

namespace annulus::app {

/// Whether `path` is a file that can be read again, unlike a pipe.
bool is_regular_file(const std::string& path);
/// Whether `path` is a pipe: whoever reads it empties it.
bool is_pipe(const std::string& path);

/// The bytes of a file or pipe. @throws InvalidArgument with the system's reason if it is neither, cannot be read, or is no configuration
/// by its size
std::string read_config(const std::string& path);

/// A text as a basic string of TOML: any UTF-8 reads back to the same bytes.
std::string toml_string(const std::string& text);

/// Applies a TOML text read from `path`: flat keys, named like the flags. Unknown keys and wrong types are refused with file and line.
/// @throws InvalidArgument
void apply_config(Draft& draft, const std::string& text, const std::string& path);

/// Path of a preset's file, beside an installed program or in the source tree; a class of old_names.hpp stands for its preset.
/// @throws InvalidArgument with the presets that exist, or with what replaces an old name
std::string preset_path(const std::string& asked);

/// One line for each preset: its name, and what the first line of its file says.
std::string preset_list();

/// The options of `command` as TOML that reads back to the same.
std::string to_toml(const Config& config, Command command);

}  // namespace annulus::app
