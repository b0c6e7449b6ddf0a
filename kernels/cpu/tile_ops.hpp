// SPDX-License-Identifier: Apache-2.0
// The vector code of attention on one tile, as a table of functions: one table per instruction set, each in a source file compiled for it.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <cstdint>

namespace annulus::kernels::cpu {

/// Extents that vector code rounds up to: a whole AVX-512 register, so that tiles need no tails in head_dim.
inline constexpr std::int64_t kPadding = 16;

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct TileOps {
  /// dst [rows, ld] fp32 <- src [rows, head_dim] of the table's element type, rows row_stride apart (elements); columns from head_dim to
  /// ld (a multiple of kPadding) become 0. dst is 64-byte aligned.
  using PackRows = void (*)(const void* src, std::int64_t row_stride, std::int64_t rows, std::int64_t head_dim, float* dst,
                            std::int64_t ld);

  const char* name;
  PackRows pack_rows[3];  ///< by dtype: fp32, fp16, bf16

  /// The same transposed: dst [round_up(head_dim, kPadding), ld]; columns from rows to round_up(rows, kPadding) become 0.
  PackRows pack_transposed[3];

  /// One tile of scores [rows, ld] becomes probabilities exp(score - max), and the running max and sum take it in.
  ///
  /// Row i sees its first visible[i] scores; from there to depth (<= ld) the probabilities are 0. scores are readable and writable up to
  /// round_up(depth, kPadding) <= ld. alpha[i] = exp(old max - new max) is what the running acc has to be multiplied with.
  void (*softmax)(float* scores, std::int64_t ld, std::int64_t rows, const std::int32_t* visible, std::int64_t depth, float* max,
                  float* sum, float* alpha);

  /// acc [rows, ld] = acc * alpha [rows] + product [rows, ld]; ld a multiple of kPadding.
  void (*accumulate)(float* acc, const float* product, const float* alpha, std::int64_t rows, std::int64_t ld);

  /// Scores and products <dO, v> of keys x queries, [keys, ld] each, become P = exp(score - max) and dS = scale P (product - sum), with a
  /// max and a sum for each of `queries` columns, a multiple of kPadding <= ld.
  void (*differentiate)(float* scores, float* products, std::int64_t ld, std::int64_t keys, std::int64_t queries, const float* max,
                        const float* sum, float scale);

  /// Whether no number of values [count] is NaN or infinite; count a multiple of kPadding.
  bool (*all_finite)(const float* values, std::int64_t count);
};

/// Index of a dtype in TileOps's tables.
constexpr int table_index(DType dtype) {
  switch (dtype) {
    case DType::fp16:
      return 1;
    case DType::bf16:
      return 2;
    case DType::fp32:
      break;
  }
  return 0;
}

const TileOps& avx2_tile_ops();
const TileOps& avx512_tile_ops();

/// The table of this CPU. @throws std::runtime_error if it has the instructions of neither
const TileOps& tile_ops();

}  // namespace annulus::kernels::cpu
