// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/fused.hpp>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace annulus::kernels::cuda::fused {
namespace {

/// Keys and values of the heads of a section: two thirds of the smallest L2 cache of a Hopper card.
constexpr std::int64_t kSectionBytes = 32LL << 20;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int32_t narrow(std::int64_t value, const char* what) {
  if (value < 0 || value > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument(std::string(what) + " " + std::to_string(value) + " does not fit 31 bits");
  }
  return static_cast<std::int32_t>(value);
}

bool hides_later_keys(Mask mask) {
  switch (mask) {
    case Mask::none:
      return false;
    case Mask::causal:
      break;
  }
  return true;
}

/// Where a progression's rows begin in a tensor map.
struct Start {
  std::int32_t map;
  std::int32_t row;
  std::int32_t residue;
};

class MapTable {
 public:
  MapTable(std::vector<MapRequest>& maps, std::span<const Operand> operands) : maps_(maps), operands_(operands) {}

  /// Finds or adds the maps of `count` operands that follow each other and are read alike.
  Start start(std::int32_t operand, int count, std::int64_t first, std::int64_t rate, std::int32_t box) {
    const std::int64_t rows = operands_[static_cast<std::size_t>(operand)].rows;
    const std::int64_t longer = rows % rate;
    const std::int64_t residue = first % rate;
    const MapRequest wanted{.operand = operand, .rate = rate, .longer = residue < longer, .box = box};
    const auto found = std::find(maps_.begin(), maps_.end(), wanted);
    const auto number = static_cast<std::int32_t>(found - maps_.begin());
    if (found == maps_.end()) {
      for (int i = 0; i < count; ++i) {
        maps_.push_back(wanted);
        maps_.back().operand += i;
      }
    }
    return {number, narrow(first / rate, "row"), narrow(wanted.longer ? residue : residue - longer, "residue")};
  }

 private:
  std::vector<MapRequest>& maps_;
  std::span<const Operand> operands_;
};

void check(const Record& record, std::span<const Operand> operands) {
  const auto at = [&](std::int32_t number) -> const Operand& {
    if (number < 0 || static_cast<std::size_t>(number) >= operands.size()) {
      throw std::invalid_argument("record of operand " + std::to_string(number) + " of " + std::to_string(operands.size()));
    }
    return operands[static_cast<std::size_t>(number)];
  };
  const auto inside = [](const Operand& operand, std::int64_t first, std::int64_t stride, std::int64_t count, const char* what) {
    if (count < 0 || first < 0 || stride < 1 || first + (count - 1) * stride >= operand.rows) {
      throw std::invalid_argument(std::string(what) + " rows " + std::to_string(first) + " + i * " + std::to_string(stride) + ", i < " +
                                  std::to_string(count) + ", lie outside the operand's " + std::to_string(operand.rows));
    }
  };
  if (record.q_rows < 1) { throw std::invalid_argument("a record of " + std::to_string(record.q_rows) + " query rows"); }
  inside(at(record.q), record.q_first, record.q_stride, record.q_rows, "query");
  inside(at(record.kv), record.k_first, record.k_stride, record.k_rows, "key");
  inside(at(record.kv + 1), record.k_first, record.k_stride, record.k_rows, "value");
  const auto last = static_cast<std::int64_t>(record.kv_heads) - 1;
  if (last < 0 || record.q_per_kv < 1 || record.q_head < 0 || record.k_head < 0 || record.q_head_step < 0 || record.k_head_step < 0 ||
      record.q_head + last * record.q_head_step + record.q_per_kv > at(record.q).heads ||
      record.k_head + last * record.k_head_step >= std::min(at(record.kv).heads, at(record.kv + 1).heads)) {
    throw std::invalid_argument("heads " + std::to_string(record.q_head) + " and " + std::to_string(record.k_head) + " + j, j < " +
                                std::to_string(record.kv_heads) + ", lie outside the operands'");
  }
}

/// Key tiles at or below the own place of a warpgroup's rows.
std::int32_t reach(const Tile& tile, const TileShape& shape, int group) {
  const std::int64_t row = static_cast<std::int64_t>(tile.diagonal) + static_cast<std::int64_t>(kGroupRows) * group;
  std::int64_t end = tile.k_rows;
  if ((tile.flags & kCausal) != 0) {
    end = row + kGroupRows;
  } else if ((tile.flags & kArrival) == 0) {
    const std::int64_t block = row >= 0 ? row / kBlockRows : -ceil_div(-row, kBlockRows);
    end = (block + 1) * kBlockRows;
  }
  return static_cast<std::int32_t>(ceil_div(std::clamp<std::int64_t>(end, 0, tile.k_rows), shape.keys));
}

/// Fills in what is streamed and who computes what.
void set_walk(Tile& tile, const TileShape& shape) {
  const auto all = static_cast<std::int32_t>(ceil_div(tile.k_rows, shape.keys));
  const int last_group = std::min((tile.q_rows - 1) / kGroupRows, shape.warpgroups - 1);
  const std::int32_t highest = reach(tile, shape, last_group);
  const std::int32_t lowest = reach(tile, shape, 0);
  const bool above = (tile.flags & kAbove) != 0;
  const bool round = !above && (tile.flags & (kDown | kCausal)) == 0;
  tile.start = above || highest == 0 ? all - 1 : highest - 1;
  tile.length = above ? all - lowest : round ? all + highest - lowest : highest;
  for (int group = 0; group <= last_group; ++group) {
    const std::int32_t own = reach(tile, shape, group);
    tile.skip[group] = static_cast<std::uint8_t>(above ? 0 : highest - own);  // warpgroups are a few key tiles apart
    tile.count[group] = above ? all - own : round ? all : own;
  }
}

/// The tiles of each section by falling length; equal ones stay in order, as neighbours read the same keys.
std::vector<Tile> longest_first(const std::vector<Tile>& tiles, const std::vector<std::size_t>& sections) {
  struct Place {
    std::int32_t length;
    std::size_t index;
  };
  std::vector<Place> places;
  places.reserve(tiles.size());
  for (std::size_t i = 0; i < tiles.size(); ++i) { places.push_back({tiles[i].length, i}); }
  for (std::size_t i = 0; i + 1 < sections.size(); ++i) {
    std::sort(places.begin() + static_cast<std::ptrdiff_t>(sections[i]), places.begin() + static_cast<std::ptrdiff_t>(sections[i + 1]),
              [](const Place& a, const Place& b) { return a.length != b.length ? a.length > b.length : a.index < b.index; });
  }
  std::vector<Tile> sorted;
  sorted.reserve(tiles.size());
  for (const Place& place : places) { sorted.push_back(tiles[place.index]); }
  return sorted;
}

}  // namespace

Operand contiguous(const void* data, std::int64_t batches, std::int64_t rows, std::int64_t heads, std::int64_t head_dim) {
  return {data, batches, rows, heads, rows * heads * head_dim, heads * head_dim, head_dim};
}

int shape_of(std::int64_t head_dim) {
  if (head_dim < 1 || head_dim % 8 != 0) { return -1; }
  int index = 0;
  for (const TileShape& shape : kTileShapes) {
    if (head_dim <= shape.head_dim) { return index; }
    ++index;
  }
  return -1;
}

std::int64_t partial_bytes(std::int64_t head_dim, std::int64_t count) {
  return partial_vectors(kTileShapes[shape_of(head_dim)].head_dim) * count * 16;
}

int tile_rows(std::int64_t head_dim) { return kGroupRows * kTileShapes[shape_of(head_dim)].warpgroups; }

namespace {

/// Collects the tiles of one launch.
class ListMaker {
 public:
  ListMaker(std::span<const Operand> operands, std::int64_t head_dim, const TileShape& shape)
      : operands_(operands), head_dim_(head_dim), shape_(shape) {}

  bool empty() const { return tiles_.empty(); }

  /// Adds the tiles of a record, unless there is no room for the maps that it needs.
  bool add(const Record& record) {
    const std::size_t maps_before = maps_.size();
    MapTable maps(maps_, operands_);
    const Start q_start = maps.start(record.q, 1, record.q_first, record.q_stride, kGroupRows);
    const Start k_start = maps.start(record.kv, 2, record.k_first, record.k_stride, shape_.keys);
    if (maps_.size() > kMaxMaps) {
      maps_.resize(maps_before);
      return false;
    }
    unequal_ = unequal_ || hides_later_keys(record.mask) || (record.part != KeyPart::all && record.order == KeyOrder::cyclic);
    const std::int64_t kv_bytes = 4 * head_dim_ * record.k_rows;  // of one KV head
    for (std::int32_t j = 0; j < record.kv_heads; ++j) {
      section_bytes_ += kv_bytes;
      if (section_bytes_ > kSectionBytes) {
        sections_.push_back(tiles_.size());
        section_bytes_ = kv_bytes;
      }
      for (std::int32_t i = 0; i < record.q_per_kv; ++i) { add_head(record, q_start, k_start, j, i); }
    }
    return true;
  }

  /// What was added, and begins anew.
  TileList take() {
    if (!unequal_) { sections_.assign(1, 0); }
    sections_.push_back(tiles_.size());
    TileList list{longest_first(tiles_, sections_), std::move(maps_)};
    *this = ListMaker(operands_, head_dim_, shape_);
    return list;
  }

 private:
  void add_head(const Record& record, const Start& q_start, const Start& k_start, std::int32_t j, std::int32_t i) {
    const Operand& q = operands_[static_cast<std::size_t>(record.q)];
    const std::int32_t head = record.q_head + j * record.q_head_step + i;
    const std::int64_t units = ceil_div(record.q_rows, kGroupRows);
    const std::int64_t first_unit = record.partial + (static_cast<std::int64_t>(j) * record.q_per_kv + i) * units;
    for (std::int64_t row = 0; row < record.q_rows; row += static_cast<std::int64_t>(kGroupRows) * shape_.warpgroups) {
      const std::int64_t token = record.q_first + row * record.q_stride;
      Tile tile;
      tile.q_map = q_start.map;
      tile.kv_map = k_start.map;
      tile.q_row = narrow(q_start.row + row, "row");
      tile.q_residue = q_start.residue;
      tile.q_batch = record.q_batch;
      tile.q_head = head;
      tile.k_row = k_start.row;
      tile.k_residue = k_start.residue;
      tile.k_batch = record.k_batch;
      tile.k_head = record.k_head + j * record.k_head_step;
      tile.q_rows = narrow(record.q_rows - row, "rows");
      tile.k_rows = record.k_rows;
      tile.diagonal = static_cast<std::int32_t>(record.diagonal + row);
      tile.flags = (record.first ? kFirst : 0) | (record.last ? kLast : 0) | (hides_later_keys(record.mask) ? kCausal : 0) |
                   (record.order == KeyOrder::arrival ? kArrival : 0) | (record.part == KeyPart::down ? kDown : 0) |
                   (record.part == KeyPart::above ? kAbove : 0);
      tile.out = ((record.q_batch * q.rows + token) * q.heads + head) * head_dim_;
      tile.out_pitch = record.q_stride * q.heads * head_dim_;
      tile.lse = (static_cast<std::int64_t>(record.q_batch) * q.heads + head) * q.rows + token;
      tile.lse_pitch = record.q_stride;
      tile.zero_keys = record.last ? record.zero_keys : 0;
      tile.partial = (first_unit + row / kGroupRows) * partial_vectors(shape_.head_dim);
      set_walk(tile, shape_);
      tiles_.push_back(tile);
    }
  }

  std::span<const Operand> operands_;
  std::int64_t head_dim_;
  TileShape shape_;
  std::vector<Tile> tiles_;
  std::vector<MapRequest> maps_;
  bool unequal_ = false;               // tiles of one record differ in length
  std::vector<std::size_t> sections_;  // where the tiles of each begin
  std::int64_t section_bytes_ = kSectionBytes;
};

}  // namespace

std::vector<TileList> make_tiles(std::span<const Record> records, std::span<const Operand> operands, std::int64_t head_dim) {
  const int index = shape_of(head_dim);
  if (index < 0) { throw std::invalid_argument("head_dim " + std::to_string(head_dim) + " is not a multiple of 8 up to 256"); }
  std::vector<TileList> lists;
  ListMaker maker(operands, head_dim, kTileShapes[index]);
  for (const Record& record : records) {
    check(record, operands);
    if (maker.add(record)) { continue; }
    lists.push_back(maker.take());
    maker.add(record);
  }
  if (!maker.empty()) { lists.push_back(maker.take()); }
  return lists;
}

}  // namespace annulus::kernels::cuda::fused
