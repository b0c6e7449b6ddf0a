// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/problem.hpp>
#include <annulus/pattern/branch_rows.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// Which rows a pattern covers: those that some branch of their head selects. A covered row sees at least itself.
class CoveredRows {
 public:
  CoveredRows(const Problem& problem, const Pattern& pattern);

  /// @param head a query head @param row a global row
  bool contains(std::int64_t head, std::int64_t row) const;

 private:
  struct Selection {
    std::int64_t branch;
    HeadClass heads;
  };

  std::int64_t seq_len_;
  Pattern pattern_;
  std::vector<std::vector<Selection>> by_head_;
};

}  // namespace annulus
