// SPDX-License-Identifier: Apache-2.0
// The figures of a bench row: one list, of which the table, JSON, CSV and HDF5 are made.
#pragma once

#include <annulus/bench/bench.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>

namespace annulus {

using FigureValue = std::variant<std::int64_t, double, std::string>;

/// One figure of a report.
struct Figure {
  std::string_view name;  ///< column of CSV and HDF5, key of JSON
  FigureValue (*get)(const BenchReport& report);
  std::string_view heading;  ///< of its column in the table; empty: it is not in the table
  int width = 0;             ///< of that column
  int decimals = 3;          ///< that the table shows of a double
  bool may_lack = false;     ///< 0 says that there is none; the table shows a dash
};

/// All of them, in the order of their columns.
std::span<const Figure> figures();

/// A figure as the table shows it, without its width.
std::string table_text(const Figure& figure, const BenchReport& report);

}  // namespace annulus
