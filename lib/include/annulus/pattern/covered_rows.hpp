// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/problem.hpp>
#include <annulus/pattern/branch_rows.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// Which rows a pattern covers: those that some branch of their head selects. A covered row sees at least itself, unless kv_lengths hides
/// it.
class CoveredRows {
 public:
  CoveredRows(const Problem& problem, const Pattern& pattern);

  /// Whether a row sees a key: there are extra ones, or a branch covers it, and kv_lengths does not hide all keys of its segment.
  /// @param entry a batch entry @param head a query head @param row a global row
  bool sees_key(std::int64_t entry, std::int64_t head, std::int64_t row) const;

  /// Calls visit(branch, rows) for every branch that selects the row; `rows` are those of its segment.
  /// @param head a query head @param row a global row
  template <class Visit>
  void for_each_branch(std::int64_t head, std::int64_t row, Visit&& visit) const {
    for (const Selection& selection : by_head_[static_cast<std::size_t>(head)]) {
      const Rows<Global> rows = segment_of(selection, row);
      if (rows.contains(row)) { visit(selection.branch, rows); }
    }
  }

 private:
  struct Selection {
    std::int64_t branch;
    HeadClass heads;
  };

  /// Rows of the segment that `row` lies in.
  Rows<Global> segment_of(const Selection& selection, std::int64_t row) const;

  Problem problem_;
  Pattern pattern_;
  std::vector<std::vector<Selection>> by_head_;
};

}  // namespace annulus
