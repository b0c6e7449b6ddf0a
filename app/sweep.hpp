// SPDX-License-Identifier: Apache-2.0
// `bench --sweep KEY=VALUES`: rows of a table, from the same options and parsers as flags and files.
#pragma once

#include "options.hpp"

#include <span>
#include <string>
#include <vector>

namespace annulus::app {

/// An option and the values it takes, one row (or more, with other axes) for each.
struct SweepAxis {
  const Option* option = nullptr;
  std::vector<Value> values;
};

/// Reads KEY=VALUE,VALUE,... KEY is an option of the problem, pattern or execution that holds a single value. A value of an integer may be
/// a range, ends included: BEGIN..END*FACTOR multiplies, BEGIN..END+STEP adds.
/// @throws InvalidArgument naming the option if a text or a value is wrong, a key appears twice, or the rows are too many
std::vector<SweepAxis> parse_sweeps(std::span<const std::string> texts);

/// One line of the table.
struct BenchRow {
  Config config;                                          ///< of this row alone; sweeps nothing
  std::vector<std::pair<std::string_view, Value>> swept;  ///< what it has of its own, by option
};

/// "seq-len 8192, dtype bf16"; empty for a table of one row.
std::string describe_swept(const BenchRow& row);

/// The rows of a configuration: all combinations of its sweeps' values, the last sweep's fastest; one without a sweep.
/// @throws InvalidArgument naming the row if its options do not fit together
std::vector<BenchRow> bench_rows(const Draft& draft);

}  // namespace annulus::app
