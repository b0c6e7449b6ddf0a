// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/cpu.hpp>
#include <annulus/kernels/visible_keys.hpp>

#include "arena.hpp"
#include "gemm.hpp"
#include "isa.hpp"
#include "tile_ops.hpp"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace annulus::kernels::cpu {
namespace {

// Tile extents: packed K and V tiles, scores and one product stay in a 512 KiB second-level cache with the rows of an item at head_dim 128.
// Summing per key tile and then over tiles also keeps the rounding error at sqrt(tile) + sqrt(tiles) instead of sqrt(keys).
constexpr std::int64_t kKeyTile = 128;
constexpr std::int64_t kDefaultTileRows = 64;
constexpr std::int64_t kMaxTilesPerItem = 4;  // query tiles that share one packed key tile
constexpr std::int64_t kItemsPerThread = 4;   // at least so many, for balance, before tiles share

constexpr std::int64_t kBlockRows = 256;  // four tiles of the default size, and two key tiles

std::int64_t tile_rows_of(const Settings& settings) { return settings.tile_rows > 0 ? settings.tile_rows : kDefaultTileRows; }

/// The tiles of one thread. `ld` is head_dim padded; rows of query tile t start at row t * tile_rows.
struct Tiles {
  Tiles(Arena& arena, std::int64_t ld, std::int64_t tile_rows)
      : q(arena.take<float>(kMaxTilesPerItem * tile_rows * ld)),
        acc(arena.take<float>(kMaxTilesPerItem * tile_rows * ld)),
        max(arena.take<float>(kMaxTilesPerItem * tile_rows)),
        sum(arena.take<float>(kMaxTilesPerItem * tile_rows)),
        k(arena.take<float>(ld * kKeyTile)),
        v(arena.take<float>(kKeyTile * ld)),
        scores(arena.take<float>(tile_rows * kKeyTile)),
        product(arena.take<float>(tile_rows * ld)),
        alpha(arena.take<float>(tile_rows)),
        visible(arena.take<std::int32_t>(tile_rows)) {}

  float* q;               ///< [rows, ld], scaled
  float* acc;             ///< [rows, ld]
  float* max;             ///< [rows]
  float* sum;             ///< [rows]
  float* k;               ///< [ld, kKeyTile], transposed
  float* v;               ///< [kKeyTile, ld]
  float* scores;          ///< [tile_rows, kKeyTile], then the probabilities
  float* product;         ///< [tile_rows, ld]
  float* alpha;           ///< [tile_rows]
  std::int32_t* visible;  ///< [tile_rows], keys of the present tile that a row sees
};

std::int64_t thread_workspace_bytes(std::int64_t head_dim, std::int64_t tile_rows) {
  Arena arena(nullptr);
  const Tiles tiles(arena, round_up(head_dim, kPadding), tile_rows);
  static_cast<void>(tiles);
  return arena.used();
}

/// Rows of one query head: a query tile.
struct QueryTile {
  std::int64_t head = 0;
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
};

/// How a task falls into items, each of up to kMaxTilesPerItem query tiles of one (batch, segment, kv_head) and one block: what one thread
/// does at a time. Where rows have no place, all rows are one block.
class Cut {
 public:
  Cut(const AttendTask& task, const Settings& settings)
      : task_(&task),
        tile_rows_(tile_rows_of(settings)),
        q_first_(task.place.block_rows > 0 ? task.place.q_first : 0),
        first_tile_(q_first_ / tile_rows_ * task.q_per_kv),
        last_tile_((q_first_ + task.q_rows + tile_rows_ - 1) / tile_rows_ * task.q_per_kv),
        tiles_per_block_(task.place.block_rows > 0 ? task.place.block_rows / tile_rows_ * task.q_per_kv : last_tile_),
        first_block_(first_tile_ / tiles_per_block_),
        blocks_((last_tile_ + tiles_per_block_ - 1) / tiles_per_block_ - first_block_),
        groups_(task.batch * task.segments * task.kv_heads),
        tiles_per_item_(
            std::clamp<std::int64_t>(groups_ * (last_tile_ - first_tile_) / (settings.threads * kItemsPerThread), 1, kMaxTilesPerItem)),
        items_per_block_((tiles_per_block_ + tiles_per_item_ - 1) / tiles_per_item_) {}

  std::int64_t items() const { return groups_ * blocks_ * items_per_block_; }
  std::int64_t tile_rows() const { return tile_rows_; }

  /// Index over (batch, segment, kv_head) of an item.
  std::int64_t group(std::int64_t item) const { return item % groups_; }

  /// Query tiles [first, last) of an item, in an order where query heads of the same rows are neighbours; none where the task has a part of
  /// a block only. Items come with the last rows first: under a causal mask they see the most keys, and the short items at the end even out
  /// the threads.
  std::pair<std::int64_t, std::int64_t> tiles(std::int64_t item) const {
    const std::int64_t index = blocks_ * items_per_block_ - 1 - item / groups_;
    const std::int64_t block = (first_block_ + index / items_per_block_) * tiles_per_block_;
    const std::int64_t first = block + index % items_per_block_ * tiles_per_item_;
    return {std::max(first, first_tile_), std::min({first + tiles_per_item_, block + tiles_per_block_, last_tile_})};
  }
  QueryTile tile(std::int64_t index) const {
    const std::int64_t place = index / task_->q_per_kv * tile_rows_ - q_first_;  // of the tile's first row, which the task may not have
    const std::int64_t first_row = std::max<std::int64_t>(0, place);
    return {index % task_->q_per_kv, first_row, std::min(place + tile_rows_, task_->q_rows) - first_row};
  }

 private:
  const AttendTask* task_;
  std::int64_t tile_rows_;
  std::int64_t q_first_;     ///< place of query row 0
  std::int64_t first_tile_;  ///< tiles are numbered from the segment's start
  std::int64_t last_tile_;
  std::int64_t tiles_per_block_;
  std::int64_t first_block_;
  std::int64_t blocks_;
  std::int64_t groups_;
  std::int64_t tiles_per_item_;
  std::int64_t items_per_block_;
};

/// One item: its query rows against all keys they see. Returns false if the product library has no code for a shape.
class Item {
 public:
  Item(const AttendTask& task, const TileOps& ops, const Cut& cut, const Tiles& tiles, std::int64_t item)
      : task_(task),
        ops_(ops),
        cut_(cut),
        tiles_(tiles),
        group_(cut.group(item)),
        first_tile_(cut.tiles(item).first),
        last_tile_(cut.tiles(item).second),
        ld_(round_up(task.head_dim, kPadding)) {}

  bool run() const noexcept {
    if (first_tile_ >= last_tile_) { return true; }
    for (std::int64_t t = first_tile_; t < last_tile_; ++t) { load(t); }
    const QueryTile last = cut_.tile(last_tile_ - 1);
    const std::int64_t seen = visible_keys(task_, last.first_row + last.rows - 1);
    bool complete = true;
    if (task_.place.block_rows == 0) {
      for (std::int64_t key = 0; key < seen && complete; key += kKeyTile) {
        complete = attend_keys(key, std::min(key + kKeyTile, task_.k_rows));
      }
    } else {
      const std::int64_t down = keys_down(task_, last.first_row);
      if (task_.place.part != KeyPart::above) { complete = walk_down(0, down, seen); }
      if (task_.place.part != KeyPart::down) { complete = complete && walk_down(down, task_.k_rows, seen); }
    }
    if (!complete) { return false; }
    for (std::int64_t t = first_tile_; t < last_tile_; ++t) { store(t); }
    return true;
  }

 private:
  /// The item's rows against keys [begin, end) of the task, from the last key tile to the first; tiles are cut at multiples of kKeyTile in
  /// the segment. From key `seen` on, no row sees any.
  bool walk_down(std::int64_t begin, std::int64_t end, std::int64_t seen) const {
    const std::int64_t place = task_.place.k_first;
    while (end > begin) {
      const std::int64_t tile = (place + end - 1) / kKeyTile * kKeyTile - place;
      const std::int64_t first = std::max(begin, tile);
      if (first < seen && !attend_keys(first, end)) { return false; }
      end = first;
    }
    return true;
  }

  /// The item's rows against keys [begin, end) of the task, at most kKeyTile of them.
  bool attend_keys(std::int64_t begin, std::int64_t end) const {
    pack_keys(begin, end - begin);
    for (std::int64_t t = first_tile_; t < last_tile_; ++t) {
      if (!attend_tile(t, begin, end - begin)) { return false; }
    }
    return true;
  }

  std::int64_t slot(std::int64_t t) const { return (t - first_tile_) * cut_.tile_rows(); }
  std::int64_t offset(const TaskStrides& strides, const QueryTile& tile, std::int64_t i) const {
    return group_offset(task_, strides, group_) + tile.head * strides.head + (tile.first_row + i) * strides.row;
  }

  void load(std::int64_t t) const {
    const QueryTile tile = cut_.tile(t);
    float* q = tiles_.q + slot(t) * ld_;
    const auto* task_q = static_cast<const std::byte*>(task_.q) + offset(task_.q_strides, tile, 0) * size_of(task_.dtype);
    ops_.pack_rows[table_index(task_.dtype)](task_q, task_.q_strides.row, tile.rows, task_.head_dim, q, ld_);
    // The scale goes into Q, rounded per element: a rounded scale would shift all scores alike.
    for (std::int64_t i = 0; i < tile.rows * ld_; ++i) { q[i] = static_cast<float>(static_cast<double>(q[i]) * task_.scale); }
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const auto* acc = static_cast<const float*>(task_.acc) + offset(task_.acc_strides, tile, i);
      float* to = tiles_.acc + (slot(t) + i) * ld_;
      std::fill(std::copy(acc, acc + task_.head_dim, to), to + ld_, 0.0F);
      tiles_.max[slot(t) + i] = static_cast<const float*>(task_.max)[offset(task_.stat_strides, tile, i)];
      tiles_.sum[slot(t) + i] = static_cast<const float*>(task_.sum)[offset(task_.stat_strides, tile, i)];
    }
  }

  void store(std::int64_t t) const {
    const QueryTile tile = cut_.tile(t);
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const float* acc = tiles_.acc + (slot(t) + i) * ld_;
      std::copy(acc, acc + task_.head_dim, static_cast<float*>(task_.acc) + offset(task_.acc_strides, tile, i));
      static_cast<float*>(task_.max)[offset(task_.stat_strides, tile, i)] = tiles_.max[slot(t) + i];
      static_cast<float*>(task_.sum)[offset(task_.stat_strides, tile, i)] = tiles_.sum[slot(t) + i];
    }
  }

  void pack_keys(std::int64_t first_key, std::int64_t keys) const {
    const int table = table_index(task_.dtype);
    const std::int64_t row = task_.kv_strides.row;
    const std::int64_t from = (group_offset(task_, task_.kv_strides, group_) + first_key * row) * size_of(task_.dtype);
    ops_.pack_transposed[table](static_cast<const std::byte*>(task_.k) + from, row, keys, task_.head_dim, tiles_.k, kKeyTile);
    ops_.pack_rows[table](static_cast<const std::byte*>(task_.v) + from, row, keys, task_.head_dim, tiles_.v, ld_);
  }

  /// Query tile t against the packed key tile.
  bool attend_tile(std::int64_t t, std::int64_t first_key, std::int64_t keys) const {
    const QueryTile tile = cut_.tile(t);
    const auto seen = [&](std::int64_t i) {
      return std::clamp<std::int64_t>(visible_keys(task_, tile.first_row + i) - first_key, 0, keys);
    };
    const std::int64_t depth = seen(tile.rows - 1);  // the last row sees the most
    if (depth == 0) { return true; }
    const bool masked = seen(0) < depth;
    for (std::int64_t i = 0; i < tile.rows; ++i) { tiles_.visible[i] = static_cast<std::int32_t>(masked ? seen(i) : depth); }

    float* acc = tiles_.acc + slot(t) * ld_;
    if (!multiply(tile.rows, round_up(depth, kPadding), task_.head_dim, tiles_.q + slot(t) * ld_, ld_, tiles_.k, kKeyTile, tiles_.scores,
                  kKeyTile)) {
      return false;
    }
    ops_.softmax(tiles_.scores, kKeyTile, tile.rows, tiles_.visible, depth, tiles_.max + slot(t), tiles_.sum + slot(t), tiles_.alpha);
    if (task_.dropout.dropout.probability > 0) { drop(tile, first_key, depth); }
    if (!multiply_values(tile.rows, depth, masked)) { return false; }
    ops_.accumulate(acc, tiles_.product, tiles_.alpha, tile.rows, ld_);
    return true;
  }

  /// Multiplies probabilities, whose sums have been taken, by their factors.
  void drop(const QueryTile& tile, std::int64_t first_key, std::int64_t depth) const {
    const GroupPlace at = group_place(task_, group_);
    float factors[kKeyTile];
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      dropout_row(task_, at.batch, at.segment, at.kv_head, tile.head, tile.first_row + i)
          .factors(dropout_key(task_, at.segment, first_key), task_.k_positions.stride, depth, factors);
      float* const probabilities = tiles_.scores + i * kKeyTile;
      for (std::int64_t j = 0; j < depth; ++j) { probabilities[j] *= factors[j]; }
    }
  }

  /// product = probabilities * V.
  bool multiply_values(std::int64_t rows, std::int64_t depth, bool masked) const {
    if (!masked || ops_.all_finite(tiles_.v, depth * ld_)) {
      return multiply(rows, ld_, depth, tiles_.scores, kKeyTile, tiles_.v, ld_, tiles_.product, ld_);
    }
    // Probability 0 does not hide a NaN or infinite value from the rows that must not see it, so each row takes its own keys only.
    std::fill(tiles_.product, tiles_.product + rows * ld_, 0.0F);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t own = tiles_.visible[i];
      if (own > 0 && !multiply(1, ld_, own, tiles_.scores + i * kKeyTile, kKeyTile, tiles_.v, ld_, tiles_.product + i * ld_, ld_)) {
        return false;
      }
    }
    return true;
  }

  const AttendTask& task_;
  const TileOps& ops_;
  const Cut& cut_;
  const Tiles& tiles_;
  std::int64_t group_;
  std::int64_t first_tile_;
  std::int64_t last_tile_;
  std::int64_t ld_;
};

}  // namespace

const TileOps& tile_ops() {
  switch (detected_isa()) {
    case Isa::avx512:
      return avx512_tile_ops();
    case Isa::avx2:
      return avx2_tile_ops();
    case Isa::none:
      break;
  }
  throw std::runtime_error("this CPU has neither AVX2 (with FMA and F16C) nor AVX-512");
}

std::int64_t block_rows(std::int64_t tile_rows) {
  const std::int64_t rows = tile_rows > 0 ? tile_rows : kDefaultTileRows;
  return kBlockRows % rows == 0 ? kBlockRows : 0;
}

std::string describe() { return std::string(supported() ? tile_ops().name : "no AVX2") + ", " + describe_gemm(); }

std::int64_t workspace_bytes(std::int64_t head_dim, const Settings& settings) {
  return settings.threads * thread_workspace_bytes(head_dim, tile_rows_of(settings));
}

void attend(const AttendTask& task, const Settings& settings, void* workspace) {
  const TileOps& ops = tile_ops();
  prepare_gemm();
  const Cut cut(task, settings);
  const std::int64_t thread_bytes = thread_workspace_bytes(task.head_dim, cut.tile_rows());
  const std::int64_t items = cut.items();
  std::atomic<bool> complete = true;  // nothing may be thrown inside the region
#pragma omp parallel num_threads(settings.threads)
  {
    Arena arena(static_cast<std::byte*>(workspace) + omp_get_thread_num() * thread_bytes);
    const Tiles tiles(arena, round_up(task.head_dim, kPadding), cut.tile_rows());
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < items; ++item) {
      if (!Item(task, ops, cut, tiles, item).run()) { complete = false; }
      if (settings.progress != nullptr) { settings.progress->fetch_add(1, std::memory_order_relaxed); }
    }
  }
  if (!complete) {
    throw std::runtime_error(describe_gemm() + " has no code for tiles of head_dim " + std::to_string(task.head_dim) + " on this CPU");
  }
}

}  // namespace annulus::kernels::cpu
