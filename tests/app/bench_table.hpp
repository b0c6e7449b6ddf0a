// SPDX-License-Identifier: Apache-2.0
// The tables that `bench --csv` writes.
#pragma once

#include <annulus_test.hpp>

#include "text_file.hpp"

#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace annulus::test {

using CsvColumns = std::map<std::string, std::vector<std::string>>;

/// A table of `--csv` by column.
inline CsvColumns columns_in(const std::string& path) {
  CsvColumns columns;
  std::vector<std::string> names;
  std::istringstream text(read_text(path));
  for (std::string line; std::getline(text, line);) {
    std::vector<std::string> fields(1);
    bool quoted = false;
    for (const char letter : line) {
      if (letter == '"') {
        quoted = !quoted;
      } else if (letter == ',' && !quoted) {
        fields.emplace_back();
      } else {
        fields.back() += letter;
      }
    }
    if (names.empty()) {
      names = fields;
    } else {
      REQUIRE(fields.size() == names.size());
      for (std::size_t i = 0; i < names.size(); ++i) { columns[names[i]].push_back(fields[i]); }
    }
  }
  return columns;
}

/// What is no time in a table, which every job that measures it finds alike, errors of the output included.
inline CsvColumns lasting_columns_in(const std::string& path) {
  CsvColumns columns = columns_in(path);
  for (const char* name : {"median_ms", "min_ms", "p95_ms", "tflops_per_rank", "communication_ms", "exposed_ms", "skew_ms",
                           "blocks_alone_ms", "overlap_efficiency", "fma_peak_gflops", "of_peak"}) {
    REQUIRE(columns.erase(name) == 1);
  }
  return columns;
}

}  // namespace annulus::test
