// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/step_summary.hpp>

#include <algorithm>
#include <cstddef>

namespace annulus {

namespace {

/// Over one StepTiming for each rank.
StepSummary summarize(std::span<const StepTiming> ranks) {
  StepSummary summary;
  if (ranks.empty()) { return summary; }
  double shortest = ranks.front().compute_ms;
  for (const StepTiming& timing : ranks) {
    summary.compute_ms = std::max(summary.compute_ms, timing.compute_ms);
    summary.communication_ms = std::max(summary.communication_ms, timing.communication_ms);
    summary.exposed_ms = std::max(summary.exposed_ms, timing.exposed_ms);
    shortest = std::min(shortest, timing.compute_ms);
  }
  summary.skew_ms = summary.compute_ms - shortest;
  return summary;
}

}  // namespace

std::vector<StepSummary> summarize_steps(std::span<const std::vector<StepTiming>> timings) {
  std::size_t steps = 0;
  for (const auto& rank : timings) { steps = std::max(steps, rank.size()); }
  std::vector<StepSummary> summaries;
  for (std::size_t step = 0; step < steps; ++step) {
    std::vector<StepTiming> ranks;
    for (const auto& rank : timings) { ranks.push_back(step < rank.size() ? rank[step] : StepTiming{}); }
    summaries.push_back(summarize(ranks));
  }
  return summaries;
}

StepSummary summarize_run(std::span<const std::vector<StepTiming>> timings) {
  std::vector<StepTiming> ranks;
  for (const auto& rank : timings) {
    StepTiming& total = ranks.emplace_back();
    for (const StepTiming& timing : rank) {
      total.compute_ms += timing.compute_ms;
      total.communication_ms += timing.communication_ms;
      total.exposed_ms += timing.exposed_ms;
    }
  }
  return summarize(ranks);
}

}  // namespace annulus
