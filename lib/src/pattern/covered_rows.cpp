// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/covered_rows.hpp>

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
    : problem_(problem), pattern_(pattern), by_head_(static_cast<std::size_t>(problem.heads)) {
  for (std::int64_t branch = 0; branch < std::ssize(pattern.branches); ++branch) {
    for (const HeadClass& heads : head_classes(problem, pattern, branch)) {
      for_each_head(problem, heads, [&](std::int64_t head) { by_head_[static_cast<std::size_t>(head)].push_back({branch, heads}); });
    }
  }
}

bool CoveredRows::sees_key(std::int64_t entry, std::int64_t head, std::int64_t row) const {
  bool sees = problem_.extra_keys > 0;
  // The first key of a segment is the last to be hidden, and a causal mask does not hide it.
  for_each_branch(head, row,
                  [&](std::int64_t /*branch*/, const Rows<Global>& rows) { sees = sees || rows[0] < problem_.kv_length(entry); });
  return sees;
}

Rows<Global> CoveredRows::segment_of(const Selection& selection, std::int64_t row) const {
  const std::int64_t length = pattern_.branches[static_cast<std::size_t>(selection.branch)].segment_length;
  return segment_rows(problem_.seq_len, pattern_, selection.branch, row / length, selection.heads);
}

}  // namespace annulus
