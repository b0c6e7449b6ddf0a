// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/layer.hpp>

#include <annulus/kernels/transform_row.hpp>

#include "gemm.hpp"
#include "isa.hpp"
#include "tile_ops.hpp"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace annulus::kernels::cpu {
namespace {

// The tiles of attention's products: a widened panel of weights and the sums of an item stay in a second-level cache of 512 KiB, and sums
// go over tiles of depth, so that their rounding error grows with sqrt(tile) + sqrt(tiles).
constexpr std::int64_t kRowTile = 64;
constexpr std::int64_t kColumnTile = 128;
constexpr std::int64_t kDepthTile = 128;
constexpr std::int64_t kTilesPerItem = 4;  // row tiles that share a widened panel
constexpr std::int64_t kItemRows = kRowTile * kTilesPerItem;

/// What one thread works on, fp32; all extents are multiples of 64 bytes.
struct LinearTiles {
  float in[kRowTile * kDepthTile];
  float weight[kDepthTile * kColumnTile];
  float product[kRowTile * kColumnTile];
  float sums[kItemRows * kColumnTile];
  float ones[kRowTile];
};
static_assert(sizeof(LinearTiles) % 64 == 0);

template <class Element>
void store_rows(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, Element* to, std::int64_t to_stride) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < columns; ++column) {
      to[row * to_stride + column] = from_float<Element>(from[row * from_stride + column]);
    }
  }
}

/// Up to kItemRows rows by one column tile. False if the product library has no code for a shape.
bool linear_item(const LinearTask& task, const TileOps& ops, LinearTiles& tiles, std::int64_t first_row,
                 std::int64_t first_column) noexcept {
  const std::int64_t rows = std::min(kItemRows, task.rows - first_row);
  const std::int64_t columns = std::min(kColumnTile, task.out_features - first_column);
  const std::int64_t element = size_of(task.dtype);
  const int table = table_index(task.dtype);
  std::fill(tiles.sums, tiles.sums + rows * kColumnTile, 0.0F);
  for (std::int64_t first_depth = 0; first_depth < task.in_features; first_depth += kDepthTile) {
    const std::int64_t depth = std::min(kDepthTile, task.in_features - first_depth);
    const auto* weight = static_cast<const std::byte*>(task.weight) + (first_depth * task.out_features + first_column) * element;
    ops.pack_rows[table](weight, task.out_features, depth, columns, tiles.weight, kColumnTile);
    for (std::int64_t done = 0; done < rows; done += kRowTile) {
      const std::int64_t part = std::min(kRowTile, rows - done);
      const auto* in = static_cast<const std::byte*>(task.in) + ((first_row + done) * task.in_features + first_depth) * element;
      ops.pack_rows[table](in, task.in_features, part, depth, tiles.in, kDepthTile);
      if (!multiply(part, round_up(columns, kPadding), depth, tiles.in, kDepthTile, tiles.weight, kColumnTile, tiles.product,
                    kColumnTile)) {
        return false;
      }
      ops.accumulate(tiles.sums + done * kColumnTile, tiles.product, tiles.ones, part, kColumnTile);
    }
  }
  with_element(task.out_dtype, [&](auto tag) {
    using Element = decltype(tag);
    store_rows(tiles.sums, kColumnTile, rows, columns, static_cast<Element*>(task.out) + first_row * task.out_features + first_column,
               task.out_features);
  });
  return true;
}

}  // namespace

std::int64_t linear_workspace_bytes(int threads) { return threads * static_cast<std::int64_t>(sizeof(LinearTiles)); }

void linear(const LinearTask& task, int threads, void* workspace) {
  const TileOps& ops = tile_ops();
  prepare_gemm();
  auto* tiles = static_cast<LinearTiles*>(workspace);
  for (int thread = 0; thread < threads; ++thread) {
    // What lies beyond a tile's columns is multiplied, added and never stored; it must not be a signalling or slow number.
    std::memset(&tiles[thread], 0, sizeof(LinearTiles));
    std::fill(std::begin(tiles[thread].ones), std::end(tiles[thread].ones), 1.0F);
  }
  const std::int64_t column_tiles = (task.out_features + kColumnTile - 1) / kColumnTile;
  const std::int64_t items = (task.rows + kItemRows - 1) / kItemRows * column_tiles;
  std::atomic<bool> complete{true};
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (items > 1)
  for (std::int64_t item = 0; item < items; ++item) {
    // Neighbouring items share rows.
    if (!linear_item(task, ops, tiles[omp_get_thread_num()], item / column_tiles * kItemRows, item % column_tiles * kColumnTile)) {
      complete = false;
    }
  }
  if (!complete) { throw std::runtime_error("the product library has no code for a tile of a product with weights"); }
}

void transform_rows(const TransformTask& task, int threads) {
  const std::vector<double> frequencies = rotary_frequencies(task);
  std::vector<float> scratch(static_cast<std::size_t>(threads * task.features));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t row = 0; row < task.rows; ++row) {
    float* values = scratch.data() + omp_get_thread_num() * task.features;
    with_element(task.in_dtype, [&](auto tag) {
      using Element = decltype(tag);
      const auto* in = static_cast<const Element*>(task.in) + row * task.features;
      for (std::int64_t i = 0; i < task.features; ++i) { values[i] = to_float(in[i]); }
    });
    transform_row(task, frequencies, row, values);
    with_element(task.out_dtype, [&](auto tag) {
      using Element = decltype(tag);
      store_rows(values, task.features, 1, task.features, static_cast<Element*>(task.out) + row * task.features, task.features);
    });
  }
}

}  // namespace annulus::kernels::cpu
