// SPDX-License-Identifier: Apache-2.0
// Numbering of the (batch, row, head) triples of a contiguous partial, and how threads share them.
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <algorithm>
#include <cstdint>

namespace annulus::kernels::cuda {

/// Division of numbers below 2^31 by a number that is fixed for a launch, as one multiplication.
/// Source: Granlund & Montgomery 1994, division by invariant integers, section 4.
class FastDivide {
 public:
  FastDivide() = default;
  explicit FastDivide(std::uint32_t divisor) : divisor_(divisor) {
    std::uint32_t log2_up = 0;
    while ((std::uint64_t{1} << log2_up) < divisor) { ++log2_up; }
    if (divisor > 1) {
      const std::uint64_t power = std::uint64_t{1} << (31U + log2_up);
      multiplier_ = static_cast<std::uint32_t>((power + divisor - 1) / divisor);
      shift_ = log2_up - 1;
    }
  }
  __device__ __forceinline__ std::uint32_t operator()(std::uint32_t value) const {
    return divisor_ == 1 ? value : __umulhi(value, multiplier_) >> shift_;
  }
  __device__ __forceinline__ std::uint32_t divisor() const { return divisor_; }

 private:
  std::uint32_t divisor_ = 1;
  std::uint32_t multiplier_ = 0;
  std::uint32_t shift_ = 0;
};

/// Where one row of a partial lies, in rows: of acc [batch, rows, heads, head_dim] and of max, sum [batch, heads, rows].
struct RowPlace {
  std::int64_t acc;
  std::int64_t stat;
};

/// A box of rows of a partial that one launch covers: batches x rows x heads, fewer than 2^31. All rows of several batches or some of one,
/// so that neighbours in the box are neighbours in acc.
struct RowBox {
  FastDivide divide_heads;
  FastDivide divide_rows;
  std::uint32_t count;
  std::int64_t first_batch;
  std::int64_t first_row;
  std::int64_t all_rows;

  __device__ __forceinline__ RowPlace place(std::uint32_t index) const {
    const std::uint32_t batch_row = divide_heads(index);
    const std::uint32_t head = index - batch_row * divide_heads.divisor();
    const std::uint32_t batch = divide_rows(batch_row);
    const std::int64_t row = first_row + static_cast<std::int64_t>(batch_row - batch * divide_rows.divisor());
    const auto heads = static_cast<std::int64_t>(divide_heads.divisor());
    const std::int64_t batch_at = first_batch + batch;
    return {(batch_at * all_rows + row) * heads + head, (batch_at * heads + head) * all_rows + row};
  }
};

/// Calls `launch(box)` for boxes that together cover a partial: one, unless it has 2^31 rows or more.
template <class Launch>
void for_each_row_box(std::int64_t batch, std::int64_t rows, std::int64_t heads, Launch&& launch) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  if (batch <= 0 || rows <= 0 || heads <= 0) { return; }
  const std::int64_t rows_step = std::clamp<std::int64_t>(kMost / heads, 1, rows);
  const std::int64_t batch_step = rows_step < rows ? 1 : std::clamp<std::int64_t>(kMost / (heads * rows), 1, batch);
  for (std::int64_t b = 0; b < batch; b += batch_step) {
    for (std::int64_t row = 0; row < rows; row += rows_step) {
      const std::int64_t box_batch = std::min(batch_step, batch - b);
      const std::int64_t box_rows = std::min(rows_step, rows - row);
      launch(RowBox{FastDivide(static_cast<std::uint32_t>(heads)), FastDivide(static_cast<std::uint32_t>(box_rows)),
                    static_cast<std::uint32_t>(box_batch * box_rows * heads), b, row, rows});
    }
  }
}

/// Threads per block of the row kernels, and rows that each group of lanes works on at once to keep loads in flight.
inline constexpr int kRowThreads = 256;
inline constexpr int kRowsAtOnce = 4;

/// log2 of the lanes that share a row: enough for `vectors` loads, at most a warp.
inline int log2_lanes(std::int64_t vectors) {
  int log2 = 0;
  while (log2 < 5 && (std::int64_t{1} << log2) < vectors) { ++log2; }
  return log2;
}

/// Blocks that cover `rows`.
inline unsigned row_blocks(std::uint32_t rows, int lanes_log2) {
  const std::uint32_t per_block = static_cast<std::uint32_t>(kRowThreads >> lanes_log2) * kRowsAtOnce;
  return (rows + per_block - 1) / per_block;
}

/// Whether `pointer` is a multiple of `bytes`.
inline bool is_aligned(const void* pointer, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

}  // namespace annulus::kernels::cuda
