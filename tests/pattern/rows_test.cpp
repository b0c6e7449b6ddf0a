// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/rows.hpp>

#include <annulus/core/error.hpp>
#include <annulus/pattern/partition.hpp>
#include <annulus_test.hpp>

#include <type_traits>

using namespace annulus;

static_assert(!std::is_convertible_v<Rows<Local>, Rows<Global>> && !std::is_constructible_v<Rows<Packed>, Rows<Local>>,
              "rows of one space are no rows of another");

TEST_CASE("rows are numbered through their runs") {
  Rows<Global> rows;
  CHECK(rows.empty());
  CHECK(rows.only().empty());
  rows.append({10, 3, 4});
  CHECK(rows.only() == Progression{10, 3, 4});
  rows.append({});
  rows.append({2, 1, 2});

  CHECK(rows.runs() == 2);
  CHECK(rows.count() == 6);
  const std::int64_t expected[] = {10, 13, 16, 19, 2, 3};
  for (std::int64_t i = 0; i < rows.count(); ++i) { CHECK(rows[i] == expected[i]); }
  CHECK(rows.contains(3));
  CHECK_FALSE(rows.contains(12));
  CHECK_THROWS_AS(rows.only(), AssertionFailure);
  CHECK_FALSE(rows == Rows<Global>(Progression{10, 3, 4}));
}

TEST_CASE("global rows stand in a shard where its pieces say, whatever their stride") {
  const Shard shard{{{{4, 3, 5}, 0}, {{100, 1, 10}, 5}}};  // 4 7 10 13 16, 100..109
  Rows<Global> rows(Progression{7, 6, 2});
  rows.append({101, 4, 3});

  const Rows<Local> local = local_rows(shard, rows);

  REQUIRE(local.count() == 5);
  const std::int64_t expected[] = {1, 3, 6, 10, 14};
  for (std::int64_t i = 0; i < local.count(); ++i) { CHECK(local[i] == expected[i]); }
  CHECK_THROWS_AS(local_rows(shard, Rows<Global>(Progression{16, 84, 2})), AssertionFailure);
}

TEST_CASE("global rows stand in a block where its runs say") {
  Rows<Global> block(Progression{0, 2, 4});
  block.append({20, 2, 4});

  CHECK(packed_rows(block, Rows<Global>(Progression{22, 4, 2})).only() == Progression{5, 2, 2});
  CHECK(packed_rows(block, Rows<Global>(Progression{6, 1, 1})).only() == Progression{3, 1, 1});
  CHECK_THROWS_AS(packed_rows(block, Rows<Global>(Progression{8, 1, 1})), AssertionFailure);
}
