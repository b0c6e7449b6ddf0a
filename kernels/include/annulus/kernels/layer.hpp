// SPDX-License-Identifier: Apache-2.0
// The operations of a multihead layer around its attention: products with weights, and what is done to the rows between two products.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <cstdint>

namespace annulus {

/// Normalisation of a row, or of each head of a row.
enum class Norm {
  none,
  layer,  ///< (x - mean) / sqrt(variance + epsilon)
  rms,    ///< x / sqrt(mean of squares + epsilon)
};

/// Which two elements of a head the rotary embedding turns together.
enum class RotaryPairs {
  none,
  neighbouring,  ///< 2i and 2i + 1
  half,          ///< i and i + head_dim / 2
};

/// What becomes of a gate before it multiplies.
enum class Gate {
  none,
  sigmoid,
  tanh,
  relu,
  gelu,  ///< z * P(normal <= z), not its approximation by tanh
};

namespace kernels {

/// out = in W: rows of in_features become rows of out_features.
struct LinearTask {
  DType dtype = DType::fp32;      ///< of in and weight
  DType out_dtype = DType::fp32;  ///< dtype, or fp32
  std::int64_t rows = 0;
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;
  const void* in = nullptr;      ///< [rows, in_features]
  const void* weight = nullptr;  ///< [in_features, out_features], contiguous
  void* out = nullptr;           ///< [rows, out_features], contiguous; must not alias in or weight
};

/// What is done to rows between two products, in this order: bias, norm, rotary embedding, gate; then they are rounded once. Every part may
/// be absent.
struct TransformTask {
  std::int64_t rows = 0;
  std::int64_t features = 0;
  DType in_dtype = DType::fp32;
  DType out_dtype = DType::fp32;
  const void* in = nullptr;  ///< [rows, features], contiguous
  void* out = nullptr;       ///< [rows, features], contiguous; must not alias in or gate_in

  const float* bias = nullptr;  ///< [features]

  Norm norm = Norm::none;
  std::int64_t norm_features = 0;      ///< neighbours that are normalised together: features, or a head's
  const float* norm_weight = nullptr;  ///< [norm_features], or none: 1
  const float* norm_bias = nullptr;    ///< [norm_features], or none: 0
  double norm_epsilon = 0;

  /// Pair i of a head of row n turns by the angle (first_position + n) * rotary_base^(-2i / head_dim): (a, b) becomes
  /// (a cos - b sin, a sin + b cos).
  RotaryPairs rotary = RotaryPairs::none;
  std::int64_t head_dim = 0;  ///< even, and divides features
  double rotary_base = 0;
  std::int64_t first_position = 0;

  /// Row and gate are multiplied element by element; the gate is function((gate_in + gate_bias) / gate_temperature).
  Gate gate = Gate::none;
  const float* gate_in = nullptr;    ///< [rows, features], contiguous
  const float* gate_bias = nullptr;  ///< [features], or none
  double gate_temperature = 1;
};

namespace cpu {

/// Bytes of workspace that linear() needs: the tiles of all threads.
std::int64_t linear_workspace_bytes(int threads);

/// As LinearTask says, with products and sums in fp32; 16-bit operands are widened, a tile at a time, and the result is rounded once, to
/// nearest even. A row's bits depend neither on the other rows nor on `threads`.
/// workspace: at least linear_workspace_bytes(threads) bytes, 64-byte aligned; nothing is in flight at return.
/// @throws std::runtime_error if the product library cannot serve a tile's shape, or the CPU is not supported()
void linear(const LinearTask& task, int threads, void* workspace);

/// As TransformTask says: in fp32, means and angles in fp64.
/// Sources: Ba et al. 2016, layer normalization, eq. 3; Zhang & Sennrich 2019, root mean square layer normalization, eq. 4; Su et al. 2021,
/// RoFormer, eq. 34; Hendrycks & Gimpel 2016, Gaussian error linear units.
void transform_rows(const TransformTask& task, int threads);

}  // namespace cpu

namespace reference {

/// As LinearTask says, in fp64; fp32 results, too, are rounded once.
void linear(const LinearTask& task);

/// As TransformTask says, in fp64.
void transform_rows(const TransformTask& task);

}  // namespace reference

}  // namespace kernels
}  // namespace annulus
