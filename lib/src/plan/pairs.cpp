// SPDX-License-Identifier: Apache-2.0
#include "pairs.hpp"

#include <algorithm>

namespace annulus::planning {

Int128 floor_sum(std::int64_t n, std::int64_t m, std::int64_t a, std::int64_t b) {
  Int128 total = 0;
  Int128 count = n;
  Int128 modulus = m;
  Int128 slope = a;
  Int128 shift = b;
  while (count > 0) {
    total += (count - 1) * count / 2 * (slope / modulus) + count * (shift / modulus);
    slope %= modulus;
    shift %= modulus;
    const Int128 top = slope * count + shift;
    if (top < modulus) { break; }
    count = top / modulus;
    shift = top % modulus;
    std::swap(modulus, slope);
  }
  return total;
}

Int128 causal_pairs(const Progression& q, const Progression& k) {
  // Queries before `first` see nothing; from `full` on they see every key; between them the count grows by a floor.
  const std::int64_t first = std::clamp<std::int64_t>(ceil_div(k.first - q.first, q.stride), 0, q.count);
  const std::int64_t full = std::clamp<std::int64_t>(ceil_div(k.last() - q.first, q.stride), first, q.count);
  const std::int64_t growing = full - first;
  const std::int64_t base = q[first] - k.first;
  return static_cast<Int128>(q.count - full) * k.count + (growing > 0 ? floor_sum(growing, k.stride, q.stride, base) + growing : Int128{0});
}

}  // namespace annulus::planning
