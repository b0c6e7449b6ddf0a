// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/statistics.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include <cmath>
#include <limits>
#include <vector>

namespace {

using namespace annulus;

TEST_CASE("the median is the middle sample or the mean of the middle two") {
  CHECK(median(std::vector<double>{7}) == 7);
  CHECK(median(std::vector<double>{9, 1, 5}) == 5);
  CHECK(median(std::vector<double>{4, 1, 3, 100}) == 3.5);
}

TEST_CASE("percentiles run from the least to the largest sample and interpolate between") {
  const std::vector<double> samples{40, 10, 30, 20, 50};

  CHECK(percentile(samples, 0) == 10);
  CHECK(percentile(samples, 25) == 20);
  CHECK(percentile(samples, 90) == 46);
  CHECK(percentile(samples, 100) == 50);
  CHECK(percentile(std::vector<double>{3}, 37) == 3);
}

TEST_CASE("a summary holds minimum, median and maximum and leaves the samples as they are") {
  const std::vector<double> samples{3, -1, 2, 8};

  const SampleSummary summary = summarize(samples);

  CHECK(summary.min == -1);
  CHECK(summary.median == 2.5);
  CHECK(summary.max == 8);
  CHECK(samples == std::vector<double>{3, -1, 2, 8});
}

TEST_CASE("no samples, a NaN and percentiles out of range are refused") {
  const double nan = std::numeric_limits<double>::quiet_NaN();

  CHECK_THROWS_AS(median(std::vector<double>{}), InvalidArgument);
  CHECK_THROWS_AS(summarize(std::vector<double>{}), InvalidArgument);
  CHECK_THROWS_AS(median(std::vector<double>{1, nan}), InvalidArgument);
  CHECK_THROWS_AS(percentile(std::vector<double>{1, 2}, 100.5), InvalidArgument);
  CHECK_THROWS_AS(percentile(std::vector<double>{1, 2}, nan), InvalidArgument);
}

}  // namespace
