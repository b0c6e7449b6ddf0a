// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/permutation.hpp>

#include <annulus/core/error.hpp>
#include <annulus/core/problem.hpp>

#include <algorithm>
#include <utility>

namespace annulus {

namespace {

/// How the curve lies in a square: it is that of the square whose corner 0 it starts from, to go to corner (1, 0), perhaps with the axes
/// exchanged, perhaps turned by half a turn. It passes the four quarters in the order (0, 0), (0, 1), (1, 1), (1, 0).
struct Orientation {
  bool exchanged = false;
  bool turned = false;

  /// Which half of x and of y the `number`-th quarter is in.
  std::pair<std::int64_t, std::int64_t> quarter(int number) const {
    std::int64_t x = number / 2;
    std::int64_t y = x ^ (number % 2);
    if (turned) {
      x ^= 1;
      y ^= 1;
    }
    return exchanged ? std::pair(y, x) : std::pair(x, y);
  }
  /// In that quarter: in the first and the last the axes are exchanged, in the last the curve is turned, too.
  Orientation inside(int number) const { return {exchanged != (number == 0 || number == 3), turned != (number == 3)}; }
};

/// Goes down from a square of side `side` to one cell, from quarter to quarter along the curve: passes over those for which
/// passes(x, y, side) says so, corner and side given, and enters the first other one. Returns the cell's x and y.
template <class Passes>
std::pair<std::int64_t, std::int64_t> descend(std::int64_t side, Passes&& passes) {
  std::int64_t x = 0;
  std::int64_t y = 0;
  Orientation orientation;
  for (side /= 2; side >= 1; side /= 2) {
    int number = 0;
    while (true) {
      const auto [right, upper] = orientation.quarter(number);
      if (number == 3 || !passes(x + right * side, y + upper * side, side)) {
        x += right * side;
        y += upper * side;
        break;
      }
      ++number;
    }
    orientation = orientation.inside(number);
  }
  return {x, y};
}

}  // namespace

Permutation::Permutation(SequenceOrder order, std::int64_t seq_len) : order_(order), seq_len_(seq_len) {
  ANNULUS_EXPECTS(seq_len >= 1 && seq_len <= kMaxSeqLen, "seq-len {} is outside 1..{}", seq_len, kMaxSeqLen);
  while (side_ * side_ < seq_len) { side_ *= 2; }
  while ((std::int64_t{1} << bits_) < seq_len) { ++bits_; }
}

std::int64_t Permutation::row_at(std::int64_t position) const {
  ANNULUS_ASSERT(position >= 0 && position < seq_len_, "position {} is outside 0..{}", position, seq_len_ - 1);
  switch (order_) {
    case SequenceOrder::linear:
      break;
    case SequenceOrder::hilbert:
      return cell_of_curve(position);
    case SequenceOrder::hilbert_inverse:
      return place_on_curve(position);
    case SequenceOrder::bit_reversal:
      return reversed_number(position);
  }
  return position;
}

std::int64_t Permutation::position_of(std::int64_t row) const {
  ANNULUS_ASSERT(row >= 0 && row < seq_len_, "row {} is outside 0..{}", row, seq_len_ - 1);
  switch (order_) {
    case SequenceOrder::linear:
      break;
    case SequenceOrder::hilbert:
      return place_on_curve(row);
    case SequenceOrder::hilbert_inverse:
      return cell_of_curve(row);
    case SequenceOrder::bit_reversal:
      return place_of_number(row);
  }
  return row;
}

/// Tokens in the square of side `side` at (x, y): they fill the first rows of the large square, and the beginning of one more.
std::int64_t Permutation::cells_in(std::int64_t x, std::int64_t y, std::int64_t side) const {
  const std::int64_t whole_rows = seq_len_ / side_;
  const std::int64_t in_last_row = seq_len_ % side_;
  const std::int64_t in_whole_rows = std::clamp<std::int64_t>(whole_rows - y, 0, side) * side;
  const bool has_last_row = y <= whole_rows && whole_rows < y + side;
  return in_whole_rows + (has_last_row ? std::clamp<std::int64_t>(in_last_row - x, 0, side) : 0);
}

std::int64_t Permutation::cell_of_curve(std::int64_t place) const {
  const auto [x, y] = descend(side_, [&](std::int64_t left, std::int64_t lower, std::int64_t side) {
    const std::int64_t cells = cells_in(left, lower, side);
    if (place < cells) { return false; }
    place -= cells;
    return true;
  });
  return y * side_ + x;
}

std::int64_t Permutation::place_on_curve(std::int64_t cell) const {
  const std::int64_t x = cell % side_;
  const std::int64_t y = cell / side_;
  std::int64_t before = 0;
  descend(side_, [&](std::int64_t left, std::int64_t lower, std::int64_t side) {
    if (x >= left && x < left + side && y >= lower && y < lower + side) { return false; }
    before += cells_in(left, lower, side);
    return true;
  });
  return before;
}

/// Tokens whose last `bits` bits are `ending`: ending, ending + 2^bits, and so on. Reversed, they are neighbours.
std::int64_t Permutation::numbers_ending_in(std::int64_t ending, int bits) const {
  return ending >= seq_len_ ? 0 : ((seq_len_ - 1 - ending) >> bits) + 1;
}

std::int64_t Permutation::reversed_number(std::int64_t place) const {
  std::int64_t number = 0;  // the first bits of the place in the whole list are the last ones of the number
  for (int bit = 0; bit < bits_; ++bit) {
    const std::int64_t with_zero = numbers_ending_in(number, bit + 1);
    if (place < with_zero) { continue; }
    place -= with_zero;
    number |= std::int64_t{1} << bit;
  }
  return number;
}

std::int64_t Permutation::place_of_number(std::int64_t number) const {
  std::int64_t before = 0;
  for (int bit = 0; bit < bits_; ++bit) {
    if (((number >> bit) & 1) == 0) { continue; }
    const std::int64_t ending = number & ((std::int64_t{1} << bit) - 1);
    before += numbers_ending_in(ending, bit + 1);
  }
  return before;
}

}  // namespace annulus
