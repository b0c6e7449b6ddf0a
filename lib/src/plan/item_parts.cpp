// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/item_parts.hpp>

#include <algorithm>

namespace annulus {

std::int64_t keys_left(const Problem& problem, const WorkItem& item, std::int64_t entry, std::int64_t segment) {
  const Progression& keys = item.k_global.only();
  if (problem.is_extra(keys.first)) { return keys.count; }
  const std::int64_t tokens = problem.kv_length(entry) - keys.first - segment * item.segment_stride;
  return std::clamp<std::int64_t>(ceil_div(tokens, keys.stride), 0, keys.count);
}

std::vector<ItemPart> parts_of(const Problem& problem, const WorkItem& item) {
  const std::int64_t keys = item.k_global.count();
  std::vector<ItemPart> parts;
  for (std::int64_t entry = 0; entry < problem.batch;) {
    std::int64_t same = entry + 1;
    while (same < problem.batch && problem.kv_length(same) == problem.kv_length(entry)) { ++same; }
    if (problem.kv_lengths.empty()) { same = problem.batch; }
    // Segments ascend and do not overlap: of one at most, only some keys are left.
    std::int64_t whole = 0;
    for (std::int64_t end = item.segments; whole < end;) {
      const std::int64_t middle = whole + (end - whole) / 2;
      if (keys_left(problem, item, entry, middle) == keys) {
        whole = middle + 1;
      } else {
        end = middle;
      }
    }
    if (whole > 0) { parts.push_back({entry, same - entry, 0, whole, keys}); }
    const std::int64_t of_next = whole < item.segments ? keys_left(problem, item, entry, whole) : 0;
    if (of_next > 0) { parts.push_back({entry, same - entry, whole, 1, of_next}); }
    entry = same;
  }
  return parts;
}

}  // namespace annulus
