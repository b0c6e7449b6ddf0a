// SPDX-License-Identifier: Apache-2.0
#include "csv.hpp"

#include <fmt/format.h>

#include <variant>

namespace annulus::app {

namespace {

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) { return text; }
  std::string quoted = "\"";
  for (const char letter : text) {
    if (letter == '"') { quoted += '"'; }
    quoted += letter;
  }
  return quoted + '"';
}

}  // namespace

std::string csv_of(const std::vector<NamedColumn>& columns, std::size_t rows) {
  std::string text;
  const auto add_line = [&](auto field) {
    std::vector<std::string> fields;
    for (const NamedColumn& column : columns) { fields.push_back(csv_field(field(column))); }
    text += fmt::format("{}\n", fmt::join(fields, ","));
  };
  add_line([](const NamedColumn& c) { return c.name; });
  for (std::size_t row = 0; row < rows; ++row) {
    add_line(
        [row](const NamedColumn& c) { return std::visit([row](const auto& values) { return fmt::format("{}", values[row]); }, c.values); });
  }
  return text;
}

}  // namespace annulus::app
