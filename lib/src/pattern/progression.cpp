// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/progression.hpp>

#include <annulus/core/error.hpp>

#include <numeric>
#include <utility>

namespace annulus {

namespace {

/// x with a * x == 1 (mod m), for coprime a and m >= 1; extended Euclid.
std::int64_t inverse_mod(std::int64_t a, std::int64_t m) {
  std::int64_t old_r = a;
  std::int64_t r = m;
  std::int64_t old_x = 1;
  std::int64_t x = 0;
  while (r != 0) {
    const std::int64_t quotient = old_r / r;
    old_r = std::exchange(r, old_r - quotient * r);
    old_x = std::exchange(x, old_x - quotient * x);
  }
  return ((old_x % m) + m) % m;
}

}  // namespace

Progression intersect(const Progression& a, const Progression& b) {
  if (a.empty() || b.empty()) { return {}; }
  const std::int64_t low = std::max(a.first, b.first);
  const std::int64_t high = std::min(a.last(), b.last());
  if (low > high) { return {}; }
  // A progression of one row keeps its stride, which may be anything; the other's then decides.
  if (a.count == 1) { return b.contains(a.first) ? Progression{a.first, 1, 1} : Progression{}; }
  if (b.count == 1) { return a.contains(b.first) ? Progression{b.first, 1, 1} : Progression{}; }

  const std::int64_t common = std::gcd(a.stride, b.stride);
  const std::int64_t gap = b.first - a.first;
  if (gap % common != 0) { return {}; }
  // Chinese remainder: a.first + i * a.stride with i = (gap / common) * (a.stride / common)^-1 (mod b.stride / common). All in 128 bits:
  // strides may be as large as the sequence.
  const std::int64_t modulus = b.stride / common;
  const auto wide =
      static_cast<Int128>(((gap / common) % modulus + modulus) % modulus) * inverse_mod((a.stride / common) % modulus, modulus);
  const auto index = static_cast<std::int64_t>(wide % modulus);
  const Int128 stride = static_cast<Int128>(a.stride) * modulus;
  const Int128 start = static_cast<Int128>(a.first) + static_cast<Int128>(index) * a.stride;
  const Int128 below = low - start;
  const Int128 steps = below <= 0 ? -((-below) / stride) : (below + stride - 1) / stride;  // to the first row >= low
  const Int128 first = start + steps * stride;
  if (first > high) { return {}; }
  const auto count = static_cast<std::int64_t>((high - first) / stride + 1);
  return {static_cast<std::int64_t>(first), count == 1 ? 1 : static_cast<std::int64_t>(stride), count};
}

Progression indices_of(const Progression& subset, const Progression& rows) {
  if (subset.empty()) { return {}; }
  ANNULUS_ASSERT(rows.contains(subset.first) && rows.contains(subset.last()), "rows {}+{}*{} are not inside {}+{}*{}", subset.first,
                 subset.stride, subset.count, rows.first, rows.stride, rows.count);
  const std::int64_t first = (subset.first - rows.first) / rows.stride;
  if (subset.count == 1) { return {first, 1, 1}; }
  ANNULUS_ASSERT(subset.stride % rows.stride == 0, "stride {} is not a multiple of {}", subset.stride, rows.stride);
  return {first, subset.stride / rows.stride, subset.count};
}

}  // namespace annulus
