// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace annulus {

/// How ranks are spread over a problem: `batch` parts of its batch entries by `heads` parts of its heads, each attended by a ring of `seq`
/// ranks. Neighbours in a ring are neighbours in the job, then come parts of the heads, then of the batch.
struct Grid {
  std::int64_t batch = 1;
  std::int64_t heads = 1;
  std::int64_t seq = 0;    ///< 0: what the others leave of the ranks
  bool automatic = false;  ///< to be chosen; the numbers mean nothing then

  std::int64_t rings() const { return batch * heads; }
  bool operator==(const Grid&) const = default;
};

/// Reads "batch=2,heads=4,seq=8", in any order, or "auto"; what is left out is as in Grid().
/// @throws InvalidArgument that says what is wrong with the text
Grid grid_from(std::string_view text);

/// What grid_from() reads; without seq if it is 0.
std::string to_string(const Grid& grid);

}  // namespace annulus
