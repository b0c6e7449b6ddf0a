// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/figures.hpp>

#include <annulus_test.hpp>

#include <algorithm>
#include <set>

using namespace annulus;

namespace {

const Figure& figure(std::string_view name) {
  const auto found = std::find_if(figures().begin(), figures().end(), [&](const Figure& each) { return each.name == name; });
  REQUIRE(found != figures().end());
  return *found;
}

}  // namespace

TEST_CASE("every figure has a name of its own, and room for its heading") {
  std::set<std::string_view> names;
  std::set<std::string_view> headings;
  for (const Figure& each : figures()) {
    INFO(each.name);
    CHECK(names.insert(each.name).second);
    if (each.heading.empty()) { continue; }
    CHECK(headings.insert(each.heading).second);
    CHECK(each.width >= static_cast<int>(each.heading.size()));
  }
}

TEST_CASE("the table shows a figure with its decimals, and a dash where there is none") {
  BenchReport report;
  report.median_ms = 1.25;
  report.tflops_per_rank = 781.02341;
  report.bytes_received = 12;
  report.check.verdict.ratio = 0.987;
  CHECK(table_text(figure("median_ms"), report) == "1.250");
  CHECK(table_text(figure("tflops_per_rank"), report) == "781.0234");
  CHECK(table_text(figure("bytes_received"), report) == "12");
  CHECK(table_text(figure("error_ratio"), report) == "0.99");
  CHECK(table_text(figure("exposed_ms"), report) == "0.000");
  for (const char* name : {"overlap_efficiency", "of_peak", "of_cycles"}) { CHECK(table_text(figure(name), report) == "-"); }
  report.of_peak = 0.5;
  CHECK(table_text(figure("of_peak"), report) == "0.500");
}
