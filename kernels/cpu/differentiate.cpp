// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/cpu.hpp>
#include <annulus/kernels/visible_keys.hpp>

#include "arena.hpp"
#include "gemm.hpp"
#include "tile_ops.hpp"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace annulus::kernels::cpu {
namespace {

// A tile of queries is packed once for each tile of keys, four times over: the more keys, the less that weighs. At head_dim 128 what a
// thread holds is 1 MiB, of which the tiles of scores and of queries, 220 KiB, are used again and again.
constexpr std::int64_t kKeyTile = 256;
constexpr std::int64_t kQueryTile = 64;

/// The tiles of one thread; `ld` is head_dim padded. Scores have keys as rows, so that dK and dV are plain products of them.
struct Tiles {
  Tiles(Arena& arena, std::int64_t ld)
      : k(arena.take<float>(kKeyTile * ld)),
        k_transposed(arena.take<float>(ld * kKeyTile)),
        v(arena.take<float>(kKeyTile * ld)),
        dk(arena.take<float>(kKeyTile * ld)),
        dv(arena.take<float>(kKeyTile * ld)),
        q(arena.take<float>(kQueryTile * ld)),
        q_transposed(arena.take<float>(ld * kQueryTile)),
        dout(arena.take<float>(kQueryTile * ld)),
        dout_transposed(arena.take<float>(ld * kQueryTile)),
        scores(arena.take<float>(kKeyTile * kQueryTile)),
        products(arena.take<float>(kKeyTile * kQueryTile)),
        factors(arena.take<float>(kKeyTile * kQueryTile)),
        dq_transposed(arena.take<float>(ld * kQueryTile)),
        max(arena.take<float>(kQueryTile)),
        sum(arena.take<float>(kQueryTile)) {}

  float* k;                ///< [kKeyTile, ld]
  float* k_transposed;     ///< [ld, kKeyTile]
  float* v;                ///< [kKeyTile, ld]
  float* dk;               ///< [kKeyTile, ld]
  float* dv;               ///< [kKeyTile, ld]
  float* q;                ///< [kQueryTile, ld]
  float* q_transposed;     ///< [ld, kQueryTile], scaled
  float* dout;             ///< [kQueryTile, ld]
  float* dout_transposed;  ///< [ld, kQueryTile]
  float* scores;           ///< [kKeyTile, kQueryTile], then P
  float* products;         ///< [kKeyTile, kQueryTile], then dS
  float* factors;          ///< [kKeyTile, kQueryTile], of probabilities where some are dropped
  float* dq_transposed;    ///< [ld, kQueryTile]
  float* max;              ///< [kQueryTile]
  float* sum;              ///< [kQueryTile]
};

std::int64_t thread_bytes(std::int64_t head_dim) {
  Arena arena(nullptr);
  const Tiles tiles(arena, round_up(head_dim, kPadding));
  static_cast<void>(tiles);
  return arena.used();
}

/// Which tile of keys may add to the rows of dQ of a tile of queries next. Keys that a row sees are the first ones, so each tile of queries
/// takes tiles 0, 1, 2, .. up to its last; threads take them up in that order, and nobody waits for who has not begun.
class Turns {
 public:
  explicit Turns(std::int64_t query_tiles) : next_(static_cast<std::size_t>(query_tiles)) {}

  /// Returns false if `failed` came true meanwhile.
  bool await(std::int64_t query_tile, std::int64_t key_tile, const std::atomic<bool>& complete) const {
    constexpr int kSpins = 2000;
    const std::atomic<std::int64_t>& next = next_[static_cast<std::size_t>(query_tile)];
    for (int spins = 0; next.load(std::memory_order_acquire) != key_tile; ++spins) {
      if (!complete.load(std::memory_order_relaxed)) { return false; }
      if (spins > kSpins) { std::this_thread::yield(); }
    }
    return true;
  }
  void pass_on(std::int64_t query_tile, std::int64_t key_tile) {
    next_[static_cast<std::size_t>(query_tile)].store(key_tile + 1, std::memory_order_release);
  }

 private:
  std::vector<std::atomic<std::int64_t>> next_;
};

std::int64_t tiles_in(std::int64_t rows, std::int64_t tile) { return (rows + tile - 1) / tile; }

/// One tile of keys of one (batch, segment, kv_head) against all queries that see some of it.
class KeyTile {
 public:
  KeyTile(const GradientTask& task, const TileOps& ops, const Tiles& tiles, Turns& turns, const std::atomic<bool>& complete,
          std::int64_t group, std::int64_t number)
      : task_(task),
        at_(task.attend),
        ops_(ops),
        tiles_(tiles),
        turns_(turns),
        complete_(complete),
        group_(group),
        number_(number),
        first_key_(number * kKeyTile),
        keys_(std::min(kKeyTile, task.attend.k_rows - number * kKeyTile)),
        ld_(round_up(task.attend.head_dim, kPadding)) {}

  /// Returns false if the product library has no code for a shape, or another thread met that.
  bool run() const noexcept {
    const std::int64_t last_row = at_.q_rows - 1;
    if (visible_keys(at_, last_row) <= first_key_) { return true; }  // no row sees any
    pack_keys();
    const std::int64_t row_tiles = tiles_in(at_.q_rows, kQueryTile);
    for (std::int64_t head = 0; head < at_.q_per_kv; ++head) {
      for (std::int64_t tile = 0; tile < row_tiles; ++tile) {
        const std::int64_t first_row = tile * kQueryTile;
        const std::int64_t rows = std::min(kQueryTile, at_.q_rows - first_row);
        if (visible_keys(at_, first_row + rows - 1) <= first_key_) { continue; }
        const std::int64_t number = (group_ * at_.q_per_kv + head) * row_tiles + tile;
        if (!meet(head, first_row, rows, number)) { return false; }
      }
    }
    add_keys(tiles_.dk, task_.dk);
    add_keys(tiles_.dv, task_.dv);
    return true;
  }

 private:
  const std::byte* bytes_at(const void* base, std::int64_t element) const {
    return static_cast<const std::byte*>(base) + element * size_of(at_.dtype);
  }

  void pack_keys() const {
    const int table = table_index(at_.dtype);
    const std::int64_t row = at_.kv_strides.row;
    const std::int64_t from = group_offset(at_, at_.kv_strides, group_) + first_key_ * row;
    ops_.pack_rows[table](bytes_at(at_.k, from), row, keys_, at_.head_dim, tiles_.k, ld_);
    ops_.pack_transposed[table](bytes_at(at_.k, from), row, keys_, at_.head_dim, tiles_.k_transposed, kKeyTile);
    ops_.pack_rows[table](bytes_at(at_.v, from), row, keys_, at_.head_dim, tiles_.v, ld_);
    std::fill(tiles_.dk, tiles_.dk + keys_ * ld_, 0.0F);
    std::fill(tiles_.dv, tiles_.dv + keys_ * ld_, 0.0F);
  }

  void add_keys(const float* from, float* to) const {
    float* rows = to + group_offset(at_, at_.kv_strides, group_) + first_key_ * at_.kv_strides.row;
    for (std::int64_t key = 0; key < keys_; ++key) {
      for (std::int64_t d = 0; d < at_.head_dim; ++d) { rows[key * at_.kv_strides.row + d] += from[key * ld_ + d]; }
    }
  }

  /// Rows [first_row, first_row + rows) of a head.
  bool meet(std::int64_t head, std::int64_t first_row, std::int64_t rows, std::int64_t number) const {
    const std::int64_t columns = round_up(rows, kPadding);
    load_queries(head, first_row, rows, columns);
    if (!multiply(keys_, columns, at_.head_dim, tiles_.k, ld_, tiles_.q_transposed, kQueryTile, tiles_.scores, kQueryTile) ||
        !multiply(keys_, columns, at_.head_dim, tiles_.v, ld_, tiles_.dout_transposed, kQueryTile, tiles_.products, kQueryTile)) {
      return false;
    }
    const bool drops = at_.dropout.dropout.probability > 0;
    if (drops) {
      draw_factors(head, first_row, rows);
      take_factors(tiles_.products, rows);
    }
    ops_.differentiate(tiles_.scores, tiles_.products, kQueryTile, keys_, columns, tiles_.max, tiles_.sum, static_cast<float>(at_.scale));
    if (drops) { take_factors(tiles_.scores, rows); }
    hide(first_row, rows);
    if (!multiply_add(keys_, ld_, rows, tiles_.scores, kQueryTile, tiles_.dout, ld_, tiles_.dv, ld_) ||
        !multiply_add(keys_, ld_, rows, tiles_.products, kQueryTile, tiles_.q, ld_, tiles_.dk, ld_) ||
        !multiply(at_.head_dim, columns, keys_, tiles_.k_transposed, kKeyTile, tiles_.products, kQueryTile, tiles_.dq_transposed,
                  kQueryTile)) {
      return false;
    }
    if (!turns_.await(number, number_, complete_)) { return false; }
    add_queries(head, first_row, rows);
    turns_.pass_on(number, number_);
    return true;
  }

  void load_queries(std::int64_t head, std::int64_t first_row, std::int64_t rows, std::int64_t columns) const {
    const int table = table_index(at_.dtype);
    const std::int64_t row = at_.q_strides.row;
    const std::int64_t from = group_offset(at_, at_.q_strides, group_) + head * at_.q_strides.head + first_row * row;
    ops_.pack_rows[table](bytes_at(at_.q, from), row, rows, at_.head_dim, tiles_.q, ld_);
    ops_.pack_transposed[table](bytes_at(at_.q, from), row, rows, at_.head_dim, tiles_.q_transposed, kQueryTile);
    ops_.pack_rows[table](bytes_at(task_.dout, from), row, rows, at_.head_dim, tiles_.dout, ld_);
    ops_.pack_transposed[table](bytes_at(task_.dout, from), row, rows, at_.head_dim, tiles_.dout_transposed, kQueryTile);
    // As attend() does, so that scores are those that the LSE is of.
    for (std::int64_t d = 0; d < at_.head_dim; ++d) {
      float* q = tiles_.q_transposed + d * kQueryTile;
      for (std::int64_t i = 0; i < columns; ++i) { q[i] = static_cast<float>(static_cast<double>(q[i]) * at_.scale); }
    }
    const std::int64_t stat = group_offset(at_, at_.stat_strides, group_) + head * at_.stat_strides.head;
    for (std::int64_t i = 0; i < columns; ++i) {
      const std::int64_t at = stat + (first_row + i) * at_.stat_strides.row;
      // A row that is not there has no probabilities.
      tiles_.max[i] = i < rows ? static_cast<const float*>(at_.max)[at] : std::numeric_limits<float>::infinity();
      tiles_.sum[i] = i < rows ? static_cast<const float*>(at_.sum)[at] : 0.0F;
    }
  }

  void draw_factors(std::int64_t head, std::int64_t first_row, std::int64_t rows) const {
    const GroupPlace at = group_place(at_, group_);
    float of_row[kKeyTile];
    for (std::int64_t i = 0; i < rows; ++i) {
      dropout_row(at_, at.batch, at.segment, at.kv_head, head, first_row + i)
          .factors(dropout_key(at_, at.segment, first_key_), at_.k_positions.stride, keys_, of_row);
      for (std::int64_t key = 0; key < keys_; ++key) { tiles_.factors[key * kQueryTile + i] = of_row[key]; }
    }
  }

  void take_factors(float* numbers, std::int64_t rows) const {
    for (std::int64_t key = 0; key < keys_; ++key) {
      for (std::int64_t i = 0; i < rows; ++i) { numbers[key * kQueryTile + i] *= tiles_.factors[key * kQueryTile + i]; }
    }
  }

  /// Probabilities of keys that a row does not see, and what comes of them, become 0.
  void hide(std::int64_t first_row, std::int64_t rows) const {
    if (visible_keys(at_, first_row) >= first_key_ + keys_) { return; }
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t seen = std::clamp<std::int64_t>(visible_keys(at_, first_row + i) - first_key_, 0, keys_);
      for (std::int64_t key = seen; key < keys_; ++key) {
        tiles_.scores[key * kQueryTile + i] = 0.0F;
        tiles_.products[key * kQueryTile + i] = 0.0F;
      }
    }
  }

  void add_queries(std::int64_t head, std::int64_t first_row, std::int64_t rows) const {
    float* dq = static_cast<float*>(at_.acc) + group_offset(at_, at_.acc_strides, group_) + head * at_.acc_strides.head +
                first_row * at_.acc_strides.row;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t d = 0; d < at_.head_dim; ++d) { dq[i * at_.acc_strides.row + d] += tiles_.dq_transposed[d * kQueryTile + i]; }
    }
  }

  const GradientTask& task_;
  const AttendTask& at_;
  const TileOps& ops_;
  const Tiles& tiles_;
  Turns& turns_;
  const std::atomic<bool>& complete_;
  std::int64_t group_;
  std::int64_t number_;
  std::int64_t first_key_;
  std::int64_t keys_;
  std::int64_t ld_;
};

}  // namespace

std::int64_t gradient_workspace_bytes(std::int64_t head_dim, const Settings& settings) { return settings.threads * thread_bytes(head_dim); }

void differentiate(const GradientTask& task, const Settings& settings, void* workspace) {
  const TileOps& ops = tile_ops();
  prepare_gemm();
  const AttendTask& at = task.attend;
  const std::int64_t groups = at.batch * at.segments * at.kv_heads;
  const std::int64_t key_tiles = tiles_in(at.k_rows, kKeyTile);
  Turns turns(groups * at.q_per_kv * tiles_in(at.q_rows, kQueryTile));
  const std::int64_t bytes = thread_bytes(at.head_dim);
  std::atomic<std::int64_t> next = 0;
  std::atomic<bool> complete = true;  // nothing may be thrown inside the region
#pragma omp parallel num_threads(settings.threads)
  {
    Arena arena(static_cast<std::byte*>(workspace) + omp_get_thread_num() * bytes);
    const Tiles tiles(arena, round_up(at.head_dim, kPadding));
    for (std::int64_t unit = next++; unit < groups * key_tiles && complete; unit = next++) {
      if (!KeyTile(task, ops, tiles, turns, complete, unit / key_tiles, unit % key_tiles).run()) { complete = false; }
      if (settings.progress != nullptr) { settings.progress->fetch_add(1, std::memory_order_relaxed); }
    }
  }
  if (!complete) {
    throw std::runtime_error(describe_gemm() + " has no code for gradients of head_dim " + std::to_string(at.head_dim) + " on this CPU");
  }
}

}  // namespace annulus::kernels::cpu
