// SPDX-License-Identifier: Apache-2.0
// Statistics of repeated measurements. The unit of the result is the unit of the samples.
#pragma once

#include <span>

namespace annulus {

/// What a report says of one quantity that was measured several times.
struct SampleSummary {
  double min = 0;
  double median = 0;
  double max = 0;
};

/// The `percent`-th percentile, 0 to 100: linear between the two nearest ranks, so that 0 is the least sample and 100 the largest.
/// @throws InvalidArgument if there are no samples, one is not finite, or `percent` is out of range
double percentile(std::span<const double> samples, double percent);

/// The middle sample, or the mean of the two middle ones.
/// @throws InvalidArgument as percentile()
double median(std::span<const double> samples);

/// @throws InvalidArgument as percentile()
SampleSummary summarize(std::span<const double> samples);

}  // namespace annulus
