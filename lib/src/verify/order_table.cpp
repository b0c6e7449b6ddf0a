// SPDX-License-Identifier: Apache-2.0
#include "order_table.hpp"

#include <cstddef>
#include <numeric>
#include <utility>

namespace annulus {

namespace {

/// Cells y * side + x of a square in the order of a Hilbert curve, without those from `cells` on. A cell is found from the last base-4
/// digit of its number on the curve to the first: each says in which quarter of a square of twice the side the square so far is, which is
/// reflected and transposed to fit there.
std::vector<std::int64_t> curve(std::int64_t side, std::int64_t cells) {
  std::vector<std::int64_t> visited;
  visited.reserve(static_cast<std::size_t>(cells));
  for (std::int64_t number = 0; number < side * side; ++number) {
    std::int64_t x = 0;
    std::int64_t y = 0;
    std::int64_t digits = number;
    for (std::int64_t s = 1; s < side; s *= 2, digits /= 4) {
      const std::int64_t right = digits / 2 % 2;
      const std::int64_t up = (digits % 2) != right ? 1 : 0;
      if (up == 0) {
        if (right == 1) {
          x = s - 1 - x;
          y = s - 1 - y;
        }
        std::swap(x, y);
      }
      x += s * right;
      y += s * up;
    }
    if (const std::int64_t cell = y * side + x; cell < cells) { visited.push_back(cell); }
  }
  return visited;
}

std::vector<std::int64_t> reversals(std::int64_t count) {
  std::int64_t power = 1;
  while (power < count) { power *= 2; }
  std::vector<std::int64_t> kept;
  for (std::int64_t number = 0; number < power; ++number) {
    std::int64_t reversed = 0;
    for (std::int64_t bit = 1; bit < power; bit *= 2) { reversed = 2 * reversed + number / bit % 2; }
    if (reversed < count) { kept.push_back(reversed); }
  }
  return kept;
}

std::vector<std::int64_t> inverse(const std::vector<std::int64_t>& table) {
  std::vector<std::int64_t> turned(table.size());
  for (std::size_t i = 0; i < table.size(); ++i) { turned[static_cast<std::size_t>(table[i])] = static_cast<std::int64_t>(i); }
  return turned;
}

}  // namespace

std::vector<std::int64_t> order_table(SequenceOrder order, std::int64_t seq_len) {
  std::int64_t side = 1;
  while (side * side < seq_len) { side *= 2; }
  switch (order) {
    case SequenceOrder::linear:
      break;
    case SequenceOrder::hilbert:
      return curve(side, seq_len);
    case SequenceOrder::hilbert_inverse:
      return inverse(curve(side, seq_len));
    case SequenceOrder::bit_reversal:
      return reversals(seq_len);
  }
  std::vector<std::int64_t> table(static_cast<std::size_t>(seq_len));
  std::iota(table.begin(), table.end(), std::int64_t{0});
  return table;
}

std::vector<std::int64_t> position_table(SequenceOrder order, std::int64_t seq_len) { return inverse(order_table(order, seq_len)); }

}  // namespace annulus
