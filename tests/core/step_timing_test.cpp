// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/step_timing.hpp>

#include <annulus_test.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

using namespace annulus;

namespace {

template <class Number>
std::vector<Number> values_of(const StepColumns& table, const std::string& name) {
  const auto column = std::find_if(table.columns.begin(), table.columns.end(), [&](const NamedColumn& each) { return each.name == name; });
  REQUIRE(column != table.columns.end());
  return std::get<std::vector<Number>>(column->values);
}

}  // namespace

TEST_CASE("the timings of steps are columns by rank and step, and a missing step is one that has not begun") {
  const std::vector<std::vector<StepTiming>> timings{{{1.0, 2.0, 3.0, std::int64_t{1} << 40, 5, -1.0, 4.5}},
                                                     {{6.0, 7.0, 8.0, 9, 10}, {11.0, 12.0, 13.0, 14, 15}}};

  const StepColumns table = step_columns(timings);

  CHECK(table.ranks == 2);
  CHECK(table.steps == 2);
  REQUIRE(table.columns.size() == kStepNumbers.size());
  CHECK(values_of<double>(table, "compute_ms") == std::vector<double>{1, 0, 6, 11});
  CHECK(values_of<double>(table, "exposed_ms") == std::vector<double>{3, 0, 8, 13});
  CHECK(values_of<std::int64_t>(table, "bytes_sent") == std::vector<std::int64_t>{std::int64_t{1} << 40, 0, 9, 14});
  const std::vector<double> work_end = values_of<double>(table, "work_end_ms");
  REQUIRE(work_end.size() == 4);
  CHECK(work_end[0] == 4.5);
  CHECK(std::isnan(work_end[1]));
  CHECK(std::isnan(work_end[2]));
  CHECK(std::isnan(work_end[3]));
}

TEST_CASE("no two numbers of a step share a name or a field, and none is left out") {
  for (const StepNumber& number : kStepNumbers) {
    CHECK(std::count_if(kStepNumbers.begin(), kStepNumbers.end(), [&](const StepNumber& other) { return other.name == number.name; }) == 1);
    CHECK(std::count_if(kStepNumbers.begin(), kStepNumbers.end(), [&](const StepNumber& other) { return other.field == number.field; }) ==
          1);
  }
  // Every number of a StepTiming is eight bytes.
  STATIC_REQUIRE(kStepNumbers.size() * sizeof(double) == sizeof(StepTiming));
}
