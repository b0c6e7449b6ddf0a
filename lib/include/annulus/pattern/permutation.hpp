// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>

#include <cstdint>

namespace annulus {

/// Which row of the sequence stands where in an order of it: a bijection of 0..seq_len-1, the same on every rank. Nothing is stored: both
/// directions cost O(log seq_len).
///
/// `hilbert`: the tokens fill a square of side 2^ceil(log2 sqrt(seq_len)) row by row; the curve visits all its cells, and those without a
/// token are left out. `hilbert-inverse` is the inverse. `bit-reversal`: the numbers below the next power of two, with their bits reversed;
/// those that are no tokens are left out. What is left out before a place is counted by whole squares of the curve, or by whole ranges of
/// numbers, that have a beginning in common.
class Permutation {
 public:
  /// @throws InvalidArgument if seq_len is not in 1..kMaxSeqLen
  Permutation(SequenceOrder order, std::int64_t seq_len);

  SequenceOrder order() const { return order_; }
  std::int64_t seq_len() const { return seq_len_; }
  bool is_identity() const { return order_ == SequenceOrder::linear; }

  /// The row of the input that the operator takes at `position`: x'[position] = x[row_at(position)].
  std::int64_t row_at(std::int64_t position) const;
  /// The inverse: where the operator takes `row`, and has its result.
  std::int64_t position_of(std::int64_t row) const;

 private:
  std::int64_t cell_of_curve(std::int64_t place) const;
  std::int64_t place_on_curve(std::int64_t cell) const;
  std::int64_t cells_in(std::int64_t x, std::int64_t y, std::int64_t side) const;
  std::int64_t reversed_number(std::int64_t place) const;
  std::int64_t place_of_number(std::int64_t number) const;
  std::int64_t numbers_ending_in(std::int64_t ending, int bits) const;

  SequenceOrder order_;
  std::int64_t seq_len_;
  std::int64_t side_ = 1;  ///< of the square
  int bits_ = 0;           ///< of the numbers that are reversed
};

}  // namespace annulus
