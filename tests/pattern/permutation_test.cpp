// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/permutation.hpp>

#include <annulus/core/error.hpp>
#include <annulus/core/problem.hpp>
#include <annulus_test.hpp>

#include "verify/order_table.hpp"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

using namespace annulus;

namespace {

std::vector<std::int64_t> rows_of(const Permutation& order, std::int64_t count) {
  std::vector<std::int64_t> rows;
  for (std::int64_t position = 0; position < count; ++position) { rows.push_back(order.row_at(position)); }
  return rows;
}

/// How many positions do not lead to a row and from there back. A map of n numbers into n that can be turned round is a bijection.
std::int64_t positions_that_do_not_return(const Permutation& order) {
  std::int64_t wrong = 0;
  for (std::int64_t position = 0; position < order.seq_len(); ++position) {
    const std::int64_t row = order.row_at(position);
    wrong += row >= 0 && row < order.seq_len() && order.position_of(row) == position ? 0 : 1;
  }
  return wrong;
}

}  // namespace

TEST_CASE("the orders of short sequences, written out") {
  CHECK(rows_of(Permutation(SequenceOrder::linear, 5), 5) == std::vector<std::int64_t>{0, 1, 2, 3, 4});
  CHECK(rows_of(Permutation(SequenceOrder::hilbert, 16), 16) ==
        std::vector<std::int64_t>{0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3});
  CHECK(rows_of(Permutation(SequenceOrder::hilbert_inverse, 16), 16) ==
        std::vector<std::int64_t>{0, 1, 14, 15, 3, 2, 13, 12, 4, 7, 8, 11, 5, 6, 9, 10});
  CHECK(rows_of(Permutation(SequenceOrder::hilbert_inverse, 256), 8) == std::vector<std::int64_t>{0, 1, 14, 15, 16, 19, 20, 21});
  CHECK(rows_of(Permutation(SequenceOrder::bit_reversal, 8), 8) == std::vector<std::int64_t>{0, 4, 2, 6, 1, 5, 3, 7});
  // Ten cells of the square of side 4: the curve above without 10 to 15. Six of the reversals of 0..7.
  CHECK(rows_of(Permutation(SequenceOrder::hilbert, 10), 10) == std::vector<std::int64_t>{0, 1, 5, 4, 8, 9, 7, 6, 2, 3});
  CHECK(rows_of(Permutation(SequenceOrder::bit_reversal, 6), 6) == std::vector<std::int64_t>{0, 4, 2, 1, 5, 3});
}

TEST_CASE("every order of every length from 1 to 4096 is a bijection") {
  for (const auto& [kind, name] : EnumNames<SequenceOrder>::values) {
    std::int64_t wrong = 0;
    for (std::int64_t seq_len = 1; seq_len <= 4096; ++seq_len) { wrong += positions_that_do_not_return(Permutation(kind, seq_len)); }
    INFO(name);
    CHECK(wrong == 0);
  }
}

TEST_CASE("every order of 2^20 tokens, and of a few more and less, is a bijection") {
  for (const auto& [kind, name] : EnumNames<SequenceOrder>::values) {
    for (const std::int64_t seq_len : {(1 << 20) - 1, 1 << 20, (1 << 20) + 1}) {
      INFO(name << " of " << seq_len);
      CHECK(positions_that_do_not_return(Permutation(kind, seq_len)) == 0);
    }
  }
}

TEST_CASE("where the length is a power of four, the curve goes from each cell to a neighbour") {
  for (std::int64_t side = 1; side <= 1024; side *= 2) {
    const Permutation order(SequenceOrder::hilbert, side * side);
    std::int64_t jumps = 0;
    for (std::int64_t position = 1; position < side * side; ++position) {
      const std::int64_t from = order.row_at(position - 1);
      const std::int64_t to = order.row_at(position);
      jumps += std::abs(from % side - to % side) + std::abs(from / side - to / side) == 1 ? 0 : 1;
    }
    INFO("side " << side);
    CHECK(jumps == 0);
  }
}

TEST_CASE("what is counted is what the checker finds by going through all of it") {
  const auto check = [](SequenceOrder kind, std::int64_t seq_len) {
    return rows_of(Permutation(kind, seq_len), seq_len) == order_table(kind, seq_len);
  };
  for (const auto& [kind, name] : EnumNames<SequenceOrder>::values) {
    INFO(name);
    std::int64_t wrong = 0;
    for (std::int64_t seq_len = 1; seq_len <= 700; ++seq_len) { wrong += check(kind, seq_len) ? 0 : 1; }
    CHECK(wrong == 0);
    CHECK(check(kind, 65536));
    CHECK(check(kind, 100003));
  }
}

TEST_CASE("the table of positions is the table of rows turned round") {
  const std::vector<std::int64_t> rows = order_table(SequenceOrder::hilbert, 777);
  const std::vector<std::int64_t> positions = position_table(SequenceOrder::hilbert, 777);
  REQUIRE(rows.size() == 777);
  REQUIRE(positions.size() == 777);
  for (std::size_t i = 0; i < rows.size(); ++i) { CHECK(positions[static_cast<std::size_t>(rows[i])] == static_cast<std::int64_t>(i)); }
  CHECK(positions == order_table(SequenceOrder::hilbert_inverse, 777));
}

TEST_CASE("positions of the longest sequences lead to their rows and back") {
  for (const auto& [kind, name] : EnumNames<SequenceOrder>::values) {
    for (const std::int64_t seq_len : {kMaxSeqLen, kMaxSeqLen - 1, (kMaxSeqLen >> 1) + 12345}) {
      const Permutation order(kind, seq_len);
      for (std::int64_t number = 0; number < 1000; ++number) {
        const std::int64_t position = number * (seq_len / 1000) + number;
        const std::int64_t row = order.row_at(position);
        INFO(name << " of " << seq_len << ", position " << position);
        REQUIRE(row >= 0);
        REQUIRE(row < seq_len);
        REQUIRE(order.position_of(row) == position);
      }
    }
  }
}

TEST_CASE("an order of no tokens, and a position outside, is refused") {
  CHECK_THROWS_AS(Permutation(SequenceOrder::hilbert, 0), InvalidArgument);
  CHECK_THROWS_AS(Permutation(SequenceOrder::hilbert, kMaxSeqLen + 1), InvalidArgument);
  const Permutation order(SequenceOrder::hilbert, 10);
  CHECK_THROWS_AS(order.row_at(10), AssertionFailure);
  CHECK_THROWS_AS(order.position_of(-1), AssertionFailure);
}
