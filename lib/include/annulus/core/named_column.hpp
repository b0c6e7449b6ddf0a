// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace annulus {

using ColumnValues = std::variant<std::vector<std::int64_t>, std::vector<double>, std::vector<std::string>>;

/// Values by the name that files and tables give them.
struct NamedColumn {
  std::string name;
  ColumnValues values;
};

}  // namespace annulus
