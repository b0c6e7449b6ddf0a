// SPDX-License-Identifier: Apache-2.0
// Every row set in the program is a progression, or a short list of them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace annulus {

/// For products of two row numbers, each of which may be as large as the sequence.
__extension__ using Int128 = __int128;

/// floor(a / b) and ceil(a / b) for b > 0 and any sign of a.
constexpr std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - ((a % b != 0 && a < 0) ? 1 : 0); }
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return -floor_div(-a, b); }

/// The rows first, first+stride, ... (count of them); stride >= 1. Empty has count 0 and compares equal to every other empty one.
struct Progression {
  std::int64_t first = 0;
  std::int64_t stride = 1;
  std::int64_t count = 0;

  constexpr bool empty() const { return count == 0; }
  constexpr std::int64_t last() const { return first + (count - 1) * stride; }  ///< of a non-empty one
  constexpr std::int64_t operator[](std::int64_t index) const { return first + index * stride; }
  /// The first `number` rows, number <= count.
  constexpr Progression first_ones(std::int64_t number) const { return {first, stride, number}; }
  constexpr bool contains(std::int64_t row) const { return count > 0 && row >= first && row <= last() && (row - first) % stride == 0; }
  friend constexpr bool operator==(const Progression& a, const Progression& b) {
    if (a.count != b.count) { return false; }
    return a.count == 0 || (a.first == b.first && (a.count == 1 || a.stride == b.stride));
  }
};

/// Rows begin, begin+1, ..., end-1 (none if end <= begin).
constexpr Progression range(std::int64_t begin, std::int64_t end) { return {begin, 1, std::max<std::int64_t>(0, end - begin)}; }

/// The rows that both hold; a progression whose stride is the least common multiple of the two.
Progression intersect(const Progression& a, const Progression& b);

/// The indices i for which rows[i] lies in `subset`: where a subset's rows stand inside a packed or local numbering of `rows`.
/// Every row of `subset` must lie in `rows`.
Progression indices_of(const Progression& subset, const Progression& rows);

}  // namespace annulus
