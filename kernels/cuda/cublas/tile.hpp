// SPDX-License-Identifier: Apache-2.0
// One tile of the unfused attention as its kernels see it, and their launchers.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include "instances.hpp"

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace annulus::kernels::cuda {

/// Softmax of one tile. Row r of instance i: scores at i * instance_stride + r * ld, `cols` of them, already scaled. Overwritten from the
/// start of the row by the probabilities in the operands' dtype, so in elements of 2 bytes the rows are 2 * ld apart.
struct SoftmaxTile {
  float* scores = nullptr;
  std::int64_t ld = 0;
  std::int64_t instance_stride = 0;
  int instances = 0;
  int rows = 0;
  int cols = 0;
  int head_dim = 0;
  InstanceMap map;
  float* max = nullptr;  ///< of row 0 of the instance with offset 0
  float* sum = nullptr;
  float* acc = nullptr;
  std::int64_t stat_row_stride = 0;
  std::int64_t acc_row_stride = 0;
  bool acc_vectorised = false;  ///< every acc row is aligned to 16 bytes and head_dim is a multiple of 4
  bool causal = false;          ///< some key of the tile is hidden from some row
  std::int64_t lead = 0;        ///< causal: global position of row 0 less that of column 0
  std::int64_t q_stride = 1;
  std::int64_t k_stride = 1;
};

/// Brings max, sum and acc of every row of the tile up to date with its scores, and turns these into probabilities. A row that sees no key
/// of the tile keeps its partial and gets probabilities 0.
void softmax_tile(DType dtype, const SoftmaxTile& tile, CUstream_st* stream);

/// The same for one element type; dtype.hpp's tags name it.
template <class Element>
void softmax_tile_as(const SoftmaxTile& tile, CUstream_st* stream);
extern template void softmax_tile_as<float>(const SoftmaxTile&, CUstream_st*);
extern template void softmax_tile_as<Fp16>(const SoftmaxTile&, CUstream_st*);
extern template void softmax_tile_as<Bf16>(const SoftmaxTile&, CUstream_st*);

/// Operands of the two products of a tile, one pointer for each instance.
struct TilePointers {
  const void** k = nullptr;
  const void** q = nullptr;
  const void** v = nullptr;
  void** scores = nullptr;
  void** acc = nullptr;
};

/// Fills the pointers of a tile's instances: base + offset of the instance, and its scores.
struct PointerTile {
  InstanceMap map;
  int instances = 0;
  int element_size = 0;
  const std::byte* k = nullptr;
  const std::byte* q = nullptr;
  const std::byte* v = nullptr;
  float* scores = nullptr;
  float* acc = nullptr;
  std::int64_t instance_stride = 0;
  TilePointers to;
};
void fill_pointers(const PointerTile& tile, CUstream_st* stream);

}  // namespace annulus::kernels::cuda
