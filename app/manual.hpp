// SPDX-License-Identifier: Apache-2.0
// What of the documentation is made of the table of options.
#pragma once

#include <string>

namespace annulus::app {

/// A page of section 1, for man.
std::string man_page();

/// A program for bash that completes commands, options, values that are names, files and presets.
std::string bash_completion();

}  // namespace annulus::app
