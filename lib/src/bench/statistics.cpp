// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/statistics.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace annulus {
namespace {

std::vector<double> sorted(std::span<const double> samples) {
  ANNULUS_EXPECTS(!samples.empty(), "there are no samples to summarize");
  for (const double sample : samples) { ANNULUS_EXPECTS(std::isfinite(sample), "sample {} is not a finite number", sample); }
  std::vector<double> ascending(samples.begin(), samples.end());
  std::sort(ascending.begin(), ascending.end());
  return ascending;
}

double percentile_of_sorted(const std::vector<double>& ascending, double percent) {
  const double place = percent / 100.0 * static_cast<double>(ascending.size() - 1);
  const auto below = std::min(static_cast<std::size_t>(place), ascending.size() - 1);
  const std::size_t above = std::min(below + 1, ascending.size() - 1);
  return std::lerp(ascending[below], ascending[above], place - static_cast<double>(below));
}

}  // namespace

double percentile(std::span<const double> samples, double percent) {
  ANNULUS_EXPECTS(percent >= 0.0 && percent <= 100.0, "percentile {} is outside 0 to 100", percent);
  return percentile_of_sorted(sorted(samples), percent);
}

double median(std::span<const double> samples) { return percentile(samples, 50.0); }

SampleSummary summarize(std::span<const double> samples) {
  const std::vector<double> ascending = sorted(samples);
  return {ascending.front(), percentile_of_sorted(ascending, 50.0), ascending.back()};
}

}  // namespace annulus
