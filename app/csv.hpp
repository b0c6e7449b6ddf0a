// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/named_column.hpp>

#include <cstddef>
#include <string>
#include <vector>

namespace annulus::app {

/// A table as RFC 4180 wants it: a line of the columns' names, then one for each row.
std::string csv_of(const std::vector<NamedColumn>& columns, std::size_t rows);

}  // namespace annulus::app
