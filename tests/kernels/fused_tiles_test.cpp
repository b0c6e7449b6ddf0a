// SPDX-License-Identifier: Apache-2.0
// From records to tiles, on the host alone.
#include <annulus/kernels/fused.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

namespace annulus {
namespace {

using namespace kernels::cuda::fused;
using kernels::KeyPart;

TileList one_list(const std::vector<Record>& records, const std::vector<Operand>& operands, std::int64_t head_dim) {
  std::vector<TileList> lists = make_tiles(records, operands, head_dim);
  REQUIRE(lists.size() == 1);
  return std::move(lists.front());
}

std::vector<Operand> operands(std::int64_t rows, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim) {
  return {contiguous(nullptr, 1, rows, heads, head_dim), contiguous(nullptr, 1, rows, kv_heads, head_dim),
          contiguous(nullptr, 1, rows, kv_heads, head_dim)};
}

/// Key tiles of a tile in the order in which they are streamed.
std::vector<std::int64_t> stream_of(const Tile& tile, std::int64_t keys) {
  const std::int64_t all = (tile.k_rows + keys - 1) / keys;
  std::vector<std::int64_t> stream;
  std::int64_t key_tile = tile.start;
  for (std::int32_t i = 0; i < tile.length; ++i) {
    stream.push_back(key_tile);
    key_tile = key_tile > 0 ? key_tile - 1 : all - 1;
  }
  return stream;
}

/// Keys of one row in the order in which its warpgroup meets them; keys that a mask hides left out.
std::vector<std::int64_t> keys_of_row(const Tile& tile, const TileShape& shape, std::int64_t row) {
  const auto group = static_cast<std::size_t>(row / kGroupRows);
  const std::vector<std::int64_t> stream = stream_of(tile, shape.keys);
  std::vector<std::int64_t> met;
  for (std::int64_t i = tile.skip[group]; i < tile.skip[group] + tile.count[group]; ++i) {
    for (std::int64_t key = stream[static_cast<std::size_t>(i)] * shape.keys;
         key < std::min<std::int64_t>((stream[static_cast<std::size_t>(i)] + 1) * shape.keys, tile.k_rows); ++key) {
      if ((tile.flags & kCausal) == 0 || key <= row + tile.diagonal) { met.push_back(key); }
    }
  }
  return met;
}

}  // namespace

TEST_CASE("every row meets every key that it sees once, its own block and below first, key tile by key tile downwards") {
  std::mt19937 engine(1);
  const auto draw = [&](std::int64_t from, std::int64_t to) {
    return from + static_cast<std::int64_t>(engine() % static_cast<std::uint64_t>(to - from + 1));
  };
  for (int i = 0; i < 3000; ++i) {
    const TileShape& shape = kTileShapes[draw(0, std::size(kTileShapes) - 1)];
    // Whole blocks where rows have a place of their own, as in the promise of equal bits; anything else by arrival.
    const bool whole = draw(0, 1) == 0;
    Record record;
    record.q_rows = static_cast<std::int32_t>(whole ? kBlockRows * draw(1, 5) - draw(0, 1) * draw(0, kBlockRows - 1) : draw(1, 700));
    record.k_rows = static_cast<std::int32_t>(draw(1, 900));
    record.diagonal = static_cast<std::int32_t>(whole ? kBlockRows * draw(-4, 8) : draw(-500, 900));
    record.mask = draw(0, 2) == 0 ? kernels::Mask::causal : kernels::Mask::none;
    record.order = whole ? KeyOrder::cyclic : KeyOrder::arrival;
    record.part = whole && record.mask == kernels::Mask::none ? static_cast<KeyPart>(draw(0, 2)) : KeyPart::all;
    record.kv_heads = 1;
    record.q = 0;
    record.kv = 1;
    const TileList list = one_list({record}, operands(2000, 1, 1, shape.head_dim), shape.head_dim);

    std::int64_t rows = 0;
    for (const Tile& tile : list.tiles) {
      const std::int64_t live = std::min<std::int64_t>(tile.q_rows, static_cast<std::int64_t>(kGroupRows) * shape.warpgroups);
      rows += live;
      for (std::int64_t row = 0; row < live; ++row) {
        const std::int64_t place = row + tile.diagonal;
        // The first key above the row's own block, and the keys that it is to meet.
        const std::int64_t block_end = record.order == KeyOrder::arrival && record.mask == kernels::Mask::none
                                           ? record.k_rows
                                           : (place >= 0 ? place / kBlockRows + 1 : -((-place - 1) / kBlockRows)) * kBlockRows;
        const std::int64_t end = std::clamp<std::int64_t>(block_end, 0, record.k_rows);
        std::vector<std::int64_t> expected;
        const auto add = [&](std::int64_t from, std::int64_t to) {
          for (std::int64_t key_tile = (to + shape.keys - 1) / shape.keys - 1; key_tile >= from / shape.keys; --key_tile) {
            for (std::int64_t key = std::max(from, key_tile * shape.keys); key < std::min<std::int64_t>(to, (key_tile + 1) * shape.keys);
                 ++key) {
              if (record.mask == kernels::Mask::none || key <= place) { expected.push_back(key); }
            }
          }
        };
        if (record.part != KeyPart::above) { add(0, end); }
        if (record.part != KeyPart::down) { add(end, record.k_rows); }
        const std::vector<std::int64_t> met = keys_of_row(tile, shape, row);
        if (met != expected) {
          CAPTURE(i, shape.head_dim, record.q_rows, record.k_rows, record.diagonal, static_cast<int>(record.part), row);
          CHECK(met == expected);
          return;
        }
      }
    }
    CHECK(rows == record.q_rows);
  }
}

TEST_CASE("a causal tile streams nothing that no row of it sees") {
  Record record;
  record.q_rows = record.k_rows = 1000;
  record.kv_heads = 1;
  record.kv = 1;
  record.mask = kernels::Mask::causal;
  for (const TileShape& shape : kTileShapes) {
    for (const Tile& tile : one_list({record}, operands(1000, 1, 1, shape.head_dim), shape.head_dim).tiles) {
      const std::int64_t last_row = tile.diagonal + std::min<std::int64_t>(tile.q_rows, kGroupRows * shape.warpgroups) - 1;
      CHECK(tile.length <= last_row / shape.keys + 1);
    }
  }
}

TEST_CASE("dilated rows share a map, and rows past the division have one of their own") {
  Record record;
  record.q_rows = record.k_rows = 100;
  record.q_stride = record.k_stride = 3;
  record.kv_heads = 1;
  record.kv = 1;
  std::vector<Record> records;
  for (const std::int64_t first : {0, 1, 2}) {
    record.q_first = record.k_first = first;
    records.push_back(record);
  }
  // 301 rows: residue 0 has 101, residues 1 and 2 have 100.
  const TileList list = one_list(records, operands(301, 1, 1, 64), 64);
  CHECK(list.maps.size() == 6);
  CHECK(std::count_if(list.maps.begin(), list.maps.end(), [](const MapRequest& map) { return map.longer; }) == 3);
  for (const Tile& tile : list.tiles) {
    const bool longer = list.maps[static_cast<std::size_t>(tile.q_map)].longer;
    CHECK(tile.q_residue == (longer ? 0 : (tile.out / 64) % 3 - 1));
  }
}

TEST_CASE("the longest tiles come first, and equal ones stay neighbours") {
  Record record;
  record.q_rows = record.k_rows = 2048;
  record.kv_heads = 2;
  record.kv = 1;
  record.mask = kernels::Mask::causal;
  const TileList list = one_list({record}, operands(2048, 2, 2, 128), 128);
  CHECK(std::is_sorted(list.tiles.begin(), list.tiles.end(), [](const Tile& a, const Tile& b) { return a.length > b.length; }));
}

TEST_CASE("heads of a record and of its keys may lie apart, each with a partial for its rows") {
  Record record;
  record.q_rows = record.k_rows = 200;
  record.kv = 1;
  record.q_head = 3;
  record.q_head_step = 8;
  record.q_per_kv = 2;
  record.k_head = 1;
  record.k_head_step = 4;
  record.kv_heads = 2;
  record.partial = 100;
  std::vector<std::array<std::int64_t, 3>> met;
  for (const Tile& tile : one_list({record}, operands(200, 16, 8, 128), 128).tiles) {
    met.push_back({tile.q_head, tile.k_head, tile.partial / partial_vectors(128)});
  }
  // Tiles of 128 rows, partials of 64.
  CHECK(met == std::vector<std::array<std::int64_t, 3>>{
                   {3, 1, 100}, {3, 1, 102}, {4, 1, 104}, {4, 1, 106}, {11, 5, 108}, {11, 5, 110}, {12, 5, 112}, {12, 5, 114}});
}

TEST_CASE("a launch has no more maps than fit, and no record is lost") {
  // Each rate needs maps of its own.
  std::vector<Record> records;
  for (std::int64_t rate = 1; rate <= 100; ++rate) {
    Record record;
    record.q_stride = record.k_stride = rate;
    record.q_rows = record.k_rows = 10;
    record.kv_heads = 1;
    record.kv = 1;
    record.partial = rate;
    records.push_back(record);
  }
  const std::vector<TileList> lists = make_tiles(records, operands(1000, 1, 1, 64), 64);
  CHECK(lists.size() == 5);
  std::vector<std::int64_t> met;
  for (const TileList& list : lists) {
    CHECK(list.maps.size() <= kMaxMaps);
    for (const Tile& tile : list.tiles) {
      met.push_back(tile.partial / partial_vectors(64));
      CHECK(list.maps[static_cast<std::size_t>(tile.q_map)].rate == met.back());
      CHECK(list.maps[static_cast<std::size_t>(tile.kv_map)].rate == met.back());
      CHECK(list.maps[static_cast<std::size_t>(tile.kv_map) + 1].operand == 2);
    }
  }
  std::sort(met.begin(), met.end());
  CHECK(met.size() == 100);
  CHECK(std::adjacent_find(met.begin(), met.end()) == met.end());
}

TEST_CASE("a record that has no key left streams none, and begins and ends its rows all the same") {
  for (const KeyOrder order : {KeyOrder::cyclic, KeyOrder::arrival}) {
    for (const KeyPart part : {KeyPart::all, KeyPart::down, KeyPart::above}) {
      for (const kernels::Mask mask : kernels::kMasks) {
        Record record;
        record.q_rows = 300;
        record.k_rows = 0;
        record.k_first = 90;
        record.kv_heads = 1;
        record.kv = 1;
        record.diagonal = 40;
        record.order = order;
        record.part = part;
        record.mask = mask;
        const TileList list = one_list({record}, operands(300, 1, 1, 128), 128);
        REQUIRE(list.tiles.size() == 3);
        for (const Tile& tile : list.tiles) {
          CHECK(tile.length == 0);
          CHECK((tile.flags & (kFirst | kLast)) == (kFirst | kLast));
          for (const std::int32_t count : tile.count) { CHECK(count == 0); }
        }
      }
    }
  }
}

TEST_CASE("records outside their operands are refused") {
  Record record;
  record.q_rows = 101;
  record.k_rows = 100;
  record.kv_heads = 1;
  record.kv = 1;
  CHECK_THROWS_AS(make_tiles(std::vector<Record>{record}, operands(100, 1, 1, 64), 64), std::invalid_argument);
  record.q_rows = 0;
  CHECK_THROWS_AS(make_tiles(std::vector<Record>{record}, operands(100, 1, 1, 64), 64), std::invalid_argument);
  record.q_rows = 100;
  record.kv_heads = 2;
  CHECK_THROWS_AS(make_tiles(std::vector<Record>{record}, operands(100, 1, 1, 64), 64), std::invalid_argument);
  record.kv_heads = 1;
  CHECK_THROWS_AS(make_tiles(std::vector<Record>{record}, operands(100, 1, 1, 60), 60), std::invalid_argument);
  CHECK_NOTHROW(make_tiles(std::vector<Record>{record}, operands(100, 1, 1, 64), 64));
}

}  // namespace annulus
