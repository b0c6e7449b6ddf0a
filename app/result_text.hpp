// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace annulus::app {

/// What a result file says of itself, for people or as JSON: its datasets, provenance, and parts if the batch was cut.
/// @throws InvalidArgument if it cannot be read
std::string result_text(const std::string& path, bool json);

}  // namespace annulus::app
