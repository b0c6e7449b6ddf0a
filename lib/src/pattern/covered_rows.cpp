// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/covered_rows.hpp>

#include <algorithm>
#include <cstddef>

namespace annulus {

namespace {

/// Calls `visit` with every query head of a head class.
template <class Visit>
void for_each_head(const Problem& problem, const HeadClass& heads, Visit&& visit) {
  const std::int64_t group = problem.heads / problem.kv_heads;
  for (const HeadSet& set : heads.head_sets) {
    for (std::int64_t j = 0; j < set.kv.count; ++j) {
      for (std::int64_t i = 0; i < set.q_per_kv; ++i) { visit(set.q_first + j * set.kv.stride * group + i); }
    }
  }
}

}  // namespace

CoveredRows::CoveredRows(const Problem& problem, const Pattern& pattern)
    : seq_len_(problem.seq_len), pattern_(pattern), by_head_(static_cast<std::size_t>(problem.heads)) {
  for (std::int64_t branch = 0; branch < std::ssize(pattern.branches); ++branch) {
    for (const HeadClass& heads : head_classes(problem, pattern, branch)) {
      for_each_head(problem, heads, [&](std::int64_t head) { by_head_[static_cast<std::size_t>(head)].push_back({branch, heads}); });
    }
  }
}

bool CoveredRows::contains(std::int64_t head, std::int64_t row) const {
  const std::vector<Selection>& selections = by_head_[static_cast<std::size_t>(head)];
  return std::any_of(selections.begin(), selections.end(),
                     [&](const Selection& selection) { return segment_of(selection, row).contains(row); });
}

Rows<Global> CoveredRows::segment_of(const Selection& selection, std::int64_t row) const {
  const std::int64_t length = pattern_.branches[static_cast<std::size_t>(selection.branch)].segment_length;
  return segment_rows(seq_len_, pattern_, selection.branch, row / length, selection.heads);
}

}  // namespace annulus
