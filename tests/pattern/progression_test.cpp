// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/progression.hpp>

#include <annulus/core/error.hpp>
#include <annulus/pattern/partition.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

using namespace annulus;

namespace {

std::set<std::int64_t> rows_of(const Progression& p) {
  std::set<std::int64_t> rows;
  for (std::int64_t i = 0; i < p.count; ++i) { rows.insert(p[i]); }
  return rows;
}

}  // namespace

TEST_CASE("floor_div and ceil_div round towards minus and plus infinity") {
  CHECK(floor_div(7, 2) == 3);
  CHECK(floor_div(-7, 2) == -4);
  CHECK(floor_div(-8, 2) == -4);
  CHECK(ceil_div(7, 2) == 4);
  CHECK(ceil_div(-7, 2) == -3);
  CHECK(ceil_div(0, 5) == 0);
}

TEST_CASE("intersect gives exactly the common rows, for thousands of random progressions") {
  const std::uint64_t seed = 20240611;
  INFO("seed " << seed);
  std::mt19937_64 random(seed);
  const auto draw = [&](std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
  };
  for (int i = 0; i < 20000; ++i) {
    const Progression a{draw(0, 60), draw(1, 13), draw(0, 20)};
    const Progression b{draw(0, 60), draw(1, 13), draw(0, 20)};
    const std::set<std::int64_t> left = rows_of(a);
    const std::set<std::int64_t> right = rows_of(b);
    std::set<std::int64_t> expected;
    std::set_intersection(left.begin(), left.end(), right.begin(), right.end(), std::inserter(expected, expected.begin()));

    const Progression common = intersect(a, b);

    INFO(a.first << "+" << a.stride << "*" << a.count << " and " << b.first << "+" << b.stride << "*" << b.count);
    REQUIRE(rows_of(common) == expected);
    REQUIRE(common.count == static_cast<std::int64_t>(expected.size()));
    REQUIRE(common == intersect(b, a));
  }
}

TEST_CASE("intersect does not overflow for strides as large as long sequences") {
  const std::int64_t prime = 2147483647;
  const Progression a{5, prime, 1 << 30};
  const Progression b{5 + prime, 2147483629, 1 << 30};

  const Progression common = intersect(a, b);

  // The strides are coprime: one common row within the shorter range of 2^61 at most, and it is in both.
  REQUIRE(common.count == 1);
  CHECK(a.contains(common.first));
  CHECK(b.contains(common.first));
}

TEST_CASE("indices_of numbers a subset inside its rows and refuses rows outside") {
  const Progression rows{10, 3, 20};
  CHECK(indices_of({16, 6, 4}, rows) == Progression{2, 2, 4});
  CHECK(indices_of({10, 1, 1}, rows) == Progression{0, 1, 1});
  CHECK(indices_of({}, rows).empty());
  CHECK_THROWS_AS(indices_of({11, 3, 2}, rows), AssertionFailure);
  CHECK_THROWS_AS(indices_of({16, 4, 2}, rows), AssertionFailure);
}

TEST_CASE("split_by_rank covers every token once, in order, with sizes that differ by at most one") {
  for (const std::int64_t seq_len : {1, 2, 7, 16, 33, 1000}) {
    for (const std::int64_t ranks : {1, 2, 3, 4, 7, 16, 40}) {
      std::int64_t next = 0;
      for (std::int64_t rank = 0; rank < ranks; ++rank) {
        const Progression rows = split_by_rank(seq_len, ranks, rank);
        CHECK(rows.count >= seq_len / ranks);
        CHECK(rows.count <= seq_len / ranks + 1);
        if (rows.empty()) { continue; }
        CHECK(rows.first == next);
        CHECK(rows.stride == 1);
        next += rows.count;
      }
      CHECK(next == seq_len);
    }
  }
}

TEST_CASE("a partition's owner agrees with its shards, empty ones included") {
  for (const PartitionKind kind : {PartitionKind::contiguous, PartitionKind::zigzag, PartitionKind::striped}) {
    for (const std::int64_t seq_len : {1, 5, 12, 31}) {
      for (const std::int64_t ranks : {1, 2, 3, 8, 40}) {
        const Partition partition(kind, seq_len, ranks);
        std::vector<std::int64_t> touching;
        std::int64_t rows = 0;
        for (std::int64_t rank = 0; rank < ranks; ++rank) {
          const Shard shard = partition.shard(rank);
          if (!shard.pieces.empty()) { touching.push_back(rank); }
          std::int64_t local = 0;
          for (const ShardPiece& piece : shard.pieces) {
            CHECK(piece.local_first == local);
            local += piece.global.count;
            for (std::int64_t i = 0; i < piece.global.count; ++i) { CHECK(partition.owner(piece.global[i]) == rank); }
          }
          rows += local;
        }
        CHECK(rows == seq_len);
        CHECK(partition.ranks_touching(0, seq_len) == touching);
      }
    }
  }
  const Partition zigzag(PartitionKind::zigzag, 16, 4);
  CHECK(zigzag.shard(1) == Shard{{{{2, 1, 2}, 0}, {{12, 1, 2}, 2}}});
  CHECK(zigzag.shard(3) == Shard{{{{6, 1, 2}, 0}, {{8, 1, 2}, 2}}});
  CHECK(Partition(PartitionKind::zigzag, 16, 1).shard(0) == Shard{{{{0, 1, 16}, 0}}});
  CHECK(zigzag.ranks_touching(5, 11) == std::vector<std::int64_t>{2, 3});
  const Partition striped(PartitionKind::striped, 10, 4);
  CHECK(striped.shard(1) == Shard{{{{1, 4, 3}, 0}}});
  CHECK(striped.shard(3) == Shard{{{{3, 4, 2}, 0}}});
  CHECK(Partition(PartitionKind::striped, 16, 1).shard(0) == Shard{{{{0, 1, 16}, 0}}});
  CHECK(striped.ranks_touching(3, 6) == std::vector<std::int64_t>{0, 1, 3});
  CHECK(striped.ranks_touching(2, 9) == std::vector<std::int64_t>{0, 1, 2, 3});
  CHECK(striped.ranks_touching(4, 4).empty());
  const Partition partition(PartitionKind::contiguous, 10, 5);
  CHECK(partition.ranks_touching(3, 6) == std::vector<std::int64_t>{1, 2});
  CHECK(partition.ranks_touching(4, 4).empty());
  CHECK_THROWS_AS(partition.shard(5), InvalidArgument);
  CHECK_THROWS_AS(Partition(PartitionKind::contiguous, 0, 1), InvalidArgument);
  CHECK_THROWS_AS(Partition(PartitionKind::contiguous, 4, 0), InvalidArgument);
}
