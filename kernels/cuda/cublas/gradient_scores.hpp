// SPDX-License-Identifier: Apache-2.0
// What happens between the products of a tile of the backward pass.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <cstdint>

struct CUstream_st;

namespace annulus::kernels::cuda {

/// Row r of instance i: scores and products <dO, v> at i * instance_stride + r * ld, `cols` of each, overwritten from the start of the row
/// by P = exp(score - max) and dS = scale P (product - sum) in the operands' dtype; 0 for keys that a row does not see.
struct GradientScores {
  float* scores = nullptr;
  float* products = nullptr;
  std::int64_t ld = 0;
  std::int64_t instance_stride = 0;
  int instances = 0;
  int rows = 0;
  int cols = 0;
  const float* max = nullptr;  ///< of row 0 of instance 0
  const float* sum = nullptr;
  std::int64_t stat_row_stride = 0;
  std::int64_t stat_instance_stride = 0;
  float scale = 1.0F;
  bool causal = false;    ///< some key of the tile is hidden from some row
  std::int64_t lead = 0;  ///< causal: global position of row 0 less that of column 0
  std::int64_t q_stride = 1;
  std::int64_t k_stride = 1;
};
void differentiate_scores(DType dtype, const GradientScores& tile, CUstream_st* stream);

/// Row r of instance i of Q and dO, and key c of K and V; 16-bit elements, everything aligned to 16 bytes.
struct GradientOperands {
  const void* q = nullptr;
  const void* dout = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  std::int64_t q_row_stride = 0;  ///< in elements, as all strides
  std::int64_t q_instance_stride = 0;
  std::int64_t kv_row_stride = 0;
  std::int64_t kv_instance_stride = 0;
  int head_dim = 0;  ///< a multiple of 8, at most kMostDimAtOnce
};
inline constexpr int kMostDimAtOnce = 128;

/// Whether the current device has the shared memory that gradient_probabilities() needs for this head_dim.
bool device_makes_at_once(std::int64_t head_dim);

/// P and dS, where and as differentiate_scores() leaves them, from the operands; nothing else of the two matrices is written. `tile.ld` is
/// a multiple of 4. Dilated tensor-core products of its own, by instructions that every device from sm_80 on has.
void gradient_probabilities(DType dtype, const GradientOperands& operands, const GradientScores& tile, CUstream_st* stream);

}  // namespace annulus::kernels::cuda
