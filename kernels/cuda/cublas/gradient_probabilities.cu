// SPDX-License-Identifier: Apache-2.0
// P and dS of a tile from its operands, in one kernel: S = scale Q K^T and dP = dO V^T never leave the registers, where the way through two
// products of the library writes and reads 16 bytes of them for each pair of a query and a key.
#include "check.hpp"
#include "element.cuh"
#include "extents.hpp"
#include "gradient_scores.cuh"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace annulus::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 128;     // of a block, whose warps are 4 x 2
constexpr int kWarpRows = 32;  // two matrices of 16
constexpr int kMostSteps = 8;  // of a block, over the columns
constexpr int kChunk = 8;      // elements of a copy, and of a row of a matrix
constexpr unsigned kAllLanes = ~0U;

/// What differs among head dims: the padded head_dim, and columns of a step. Where a block takes half of the registers, two share an SM,
/// and one multiplies while the other takes exponentials.
template <int kPaddedDim, int kStepCols, int kBlocksOfSm>
struct Shape {
  static constexpr int kDim = kPaddedDim;
  static constexpr int kCols = kStepCols;
  static constexpr int kBlocks = kBlocksOfSm;
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kColumnTiles = kCols / 16;  ///< of 8 columns, of a warp
  static constexpr int kRowTileBytes = kRows * kDim * 2;
  static constexpr int kColumnTileBytes = kCols * kDim * 2;
  static constexpr int kSharedBytes = 2 * kRowTileBytes + 4 * kColumnTileBytes;
};

/// Where a chunk of a row lies in a tile of shared memory: eight rows of one chunk in eight different banks of 16 bytes.
template <class S>
__device__ __forceinline__ unsigned place_of(int row, int chunk) {
  const int mixed = S::kChunks >= 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & (S::kChunks - 1));
  return static_cast<unsigned>((row * S::kChunks + mixed) * 16);
}

/// Begins to copy rows of an operand to shared memory, with zeros for rows and columns that it does not have.
template <class S, int kTileRows, class Element>
__device__ __forceinline__ void copy_rows(unsigned to, const Element* from, std::int64_t row_stride, int rows, int head_dim) {
#pragma unroll
  for (int i = 0; i < kTileRows * S::kChunks; i += kThreads) {
    const int number = i + static_cast<int>(threadIdx.x);
    const int row = number / S::kChunks;
    const int chunk = number % S::kChunks;
    const bool inside = row < rows && chunk * kChunk < head_dim;
    const Element* const source = inside ? from + row * row_stride + chunk * kChunk : from;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + place_of<S>(row, chunk)), "l"(source), "r"(inside ? 16 : 0)
                 : "memory");
  }
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                             __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Rows of one operand by rows of another, of a warp: 32 of the first by the half of the columns that is the warp's.
template <class S, class Element>
__device__ __forceinline__ void multiply(float (&acc)[2][S::kColumnTiles][4], unsigned row_tile, unsigned column_tile, int first_row,
                                         int first_col) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int chunk = 0; chunk < S::kChunks; chunk += 2) {
    std::uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) { load_matrices(a[m], row_tile + place_of<S>(first_row + 16 * m + lane % 16, chunk + lane / 16)); }
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; n += 2) {
      std::uint32_t b[4];
      load_matrices(b, column_tile + place_of<S>(first_col + 8 * n + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add(acc[m][n], a[m], b[0], b[1], Element{});
        multiply_add(acc[m][n + 1], a[m], b[2], b[3], Element{});
      }
    }
  }
}

__device__ __forceinline__ std::uint32_t pair_of(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ std::uint32_t pair_of(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

/// Of four matrices each lane of a quad holds a pair of neighbours of one row; it gets the whole row of the matrix of its own number.
__device__ __forceinline__ uint4 row_of_quad(std::uint32_t (&pairs)[4]) {
  const unsigned quad = threadIdx.x % 4;
  const bool odd = (quad & 1U) != 0;
  const bool upper = (quad & 2U) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t other = __shfl_xor_sync(kAllLanes, odd ? pairs[i] : pairs[i + 1], 1);
    if (odd) {
      pairs[i] = other;
    } else {
      pairs[i + 1] = other;
    }
  }
  const std::uint32_t first = __shfl_xor_sync(kAllLanes, upper ? pairs[0] : pairs[2], 2);
  const std::uint32_t second = __shfl_xor_sync(kAllLanes, upper ? pairs[1] : pairs[3], 2);
  return upper ? make_uint4(first, second, pairs[2], pairs[3]) : make_uint4(pairs[0], pairs[1], first, second);
}

/// A block makes 128 rows of one instance, over some steps of its columns; Q and dO stay in shared memory, K and V of the next step come
/// while those of this one are multiplied.
template <class Element, class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    gradient_probabilities_kernel(const __grid_constant__ GradientOperands operands, const __grid_constant__ GradientScores tile,
                                  int steps) {
  extern __shared__ __align__(128) std::byte shared[];
  const auto q_tile = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const unsigned dout_tile = q_tile + S::kRowTileBytes;
  const unsigned kv_tiles = dout_tile + S::kRowTileBytes;

  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int block_row = static_cast<int>(blockIdx.x) * kRows;
  const auto instance = static_cast<std::int64_t>(blockIdx.y);
  const int step_begin = static_cast<int>(blockIdx.z) * steps;
  const int all_steps = (tile.cols + S::kCols - 1) / S::kCols;
  const int step_end = min(step_begin + steps, all_steps);
  // Further steps hold no key that a row of the block sees.
  const int last_row = min(block_row + kRows, tile.rows) - 1;
  const int live_end = min(step_end, (visible_of(tile, last_row) + S::kCols - 1) / S::kCols);

  const std::int64_t q_at = instance * operands.q_instance_stride + block_row * operands.q_row_stride;
  const std::int64_t kv_at = instance * operands.kv_instance_stride;
  const auto* const k = static_cast<const Element*>(operands.k) + kv_at;
  const auto* const v = static_cast<const Element*>(operands.v) + kv_at;
  const auto copy_step = [&](int step) {
    const unsigned to = kv_tiles + static_cast<unsigned>(step & 1) * 2 * S::kColumnTileBytes;
    const std::int64_t begin = step * static_cast<std::int64_t>(S::kCols) * operands.kv_row_stride;
    const int rows = tile.cols - step * S::kCols;
    copy_rows<S, S::kCols>(to, k + begin, operands.kv_row_stride, rows, operands.head_dim);
    copy_rows<S, S::kCols>(to + S::kColumnTileBytes, v + begin, operands.kv_row_stride, rows, operands.head_dim);
  };
  if (step_begin < live_end) {
    const int rows = tile.rows - block_row;
    copy_rows<S, kRows>(q_tile, static_cast<const Element*>(operands.q) + q_at, operands.q_row_stride, rows, operands.head_dim);
    copy_rows<S, kRows>(dout_tile, static_cast<const Element*>(operands.dout) + q_at, operands.q_row_stride, rows, operands.head_dim);
    copy_step(step_begin);
  }
  end_group();

  const int warp_row = warp / 2 * kWarpRows;
  const int warp_col = warp % 2 * (S::kCols / 2);
  float max[2][2];
  float sum[2][2];
  int visible[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block_row + warp_row + 16 * m + 8 * half + lane / 4;
      const bool inside = row < tile.rows;
      const std::int64_t stat = instance * tile.stat_instance_stride + row * tile.stat_row_stride;
      max[m][half] = inside ? __ldg(tile.max + stat) : INFINITY;
      sum[m][half] = inside ? __ldg(tile.sum + stat) : 0.0F;
      visible[m][half] = inside ? visible_of(tile, row) : 0;
    }
  }
  // Rows of P and of dS are as long as those of the two float matrices in whose place they are.
  const std::int64_t ld = 2 * tile.ld;
  const std::int64_t instance_at = 2 * instance * tile.instance_stride;
  auto* const probabilities = reinterpret_cast<Element*>(tile.scores) + instance_at;
  auto* const gradients = reinterpret_cast<Element*>(tile.products) + instance_at;
  const auto store = [&](int step, int m, int half, int group, uint4 p, uint4 ds) {
    const int row = block_row + warp_row + 16 * m + 8 * half + lane / 4;
    const int column = step * S::kCols + warp_col + (4 * group + lane % 4) * kChunk;
    if (row >= tile.rows || column >= ld) { return; }
    *reinterpret_cast<uint4*>(probabilities + row * ld + column) = p;
    *reinterpret_cast<uint4*>(gradients + row * ld + column) = ds;
  };

  for (int step = step_begin; step < live_end; ++step) {
    if (step + 1 < live_end) { copy_step(step + 1); }
    end_group();
    wait_for_all_but<1>();
    __syncthreads();
    float s[2][S::kColumnTiles][4] = {};
    float product[2][S::kColumnTiles][4] = {};
    const unsigned kv_tile = kv_tiles + static_cast<unsigned>(step & 1) * 2 * S::kColumnTileBytes;
    multiply<S, Element>(s, q_tile, kv_tile, warp_row, warp_col);
    multiply<S, Element>(product, dout_tile, kv_tile + S::kColumnTileBytes, warp_row, warp_col);
    __syncthreads();  // the next copy is to where this step's keys lay
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int group = 0; group < S::kColumnTiles / 4; ++group) {
          std::uint32_t p_pairs[4];
          std::uint32_t ds_pairs[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int n = 4 * group + i;
            const int column = step * S::kCols + warp_col + n * 8 + 2 * (lane % 4);
            float p[2];
            float ds[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              // What is hidden may be anything, also NaN.
              const bool seen = column + j < visible[m][half];
              p[j] = seen ? exp_fast(tile.scale * s[m][n][2 * half + j] - max[m][half]) : 0.0F;
              ds[j] = seen ? tile.scale * p[j] * (product[m][n][2 * half + j] - sum[m][half]) : 0.0F;
            }
            p_pairs[i] = pair_of(p[0], p[1], Element{});
            ds_pairs[i] = pair_of(ds[0], ds[1], Element{});
          }
          store(step, m, half, group, row_of_quad(p_pairs), row_of_quad(ds_pairs));
        }
      }
    }
  }
  wait_for_all_but<0>();

  const uint4 zeros = make_uint4(0, 0, 0, 0);
  for (int step = step_begin < live_end ? live_end : step_begin; step < step_end; ++step) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int group = 0; group < S::kColumnTiles / 4; ++group) { store(step, m, half, group, zeros, zeros); }
      }
    }
  }
}

template <class Element, class S>
void launch(const GradientOperands& operands, const GradientScores& tile, CUstream_st* stream) {
  auto* const kernel = gradient_probabilities_kernel<Element, S>;
  int device = 0;
  int processors = 0;
  ANNULUS_KERNELS_CHECK(cudaGetDevice(&device));
  ANNULUS_KERNELS_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  ANNULUS_KERNELS_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes));
  const std::int64_t row_blocks = ceil_div(tile.rows, kRows);
  const std::int64_t all_steps = ceil_div(tile.cols, S::kCols);
  const std::int64_t places = static_cast<std::int64_t>(processors) * S::kBlocks;
  // Enough blocks for the device first; beyond that, Q and dO are copied for as many steps as possible.
  const std::int64_t steps = std::clamp<std::int64_t>(row_blocks * tile.instances * all_steps / places, 1, kMostSteps);
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(tile.instances),
                  static_cast<unsigned>(ceil_div(all_steps, steps)));
  kernel<<<grid, kThreads, S::kSharedBytes, stream>>>(operands, tile, static_cast<int>(steps));
  check_launch("gradient_probabilities_kernel");
}

using Dim32 = Shape<32, 64, 2>;
using Dim64 = Shape<64, 64, 2>;
using Dim128 = Shape<128, 128, 1>;
using Dim128OfLess = Shape<128, 64, 1>;  // where a block may have less of shared memory

int most_shared_bytes() {
  int device = 0;
  int bytes = 0;
  ANNULUS_KERNELS_CHECK(cudaGetDevice(&device));
  ANNULUS_KERNELS_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

template <class Element>
void launch_for(const GradientOperands& operands, const GradientScores& tile, CUstream_st* stream) {
  if (operands.head_dim <= Dim32::kDim) { return launch<Element, Dim32>(operands, tile, stream); }
  if (operands.head_dim <= Dim64::kDim) { return launch<Element, Dim64>(operands, tile, stream); }
  if (Dim128::kSharedBytes <= most_shared_bytes()) { return launch<Element, Dim128>(operands, tile, stream); }
  launch<Element, Dim128OfLess>(operands, tile, stream);
}

}  // namespace

bool device_makes_at_once(std::int64_t head_dim) {
  const int bytes = head_dim <= Dim32::kDim   ? Dim32::kSharedBytes
                    : head_dim <= Dim64::kDim ? Dim64::kSharedBytes
                                              : Dim128OfLess::kSharedBytes;
  return bytes <= most_shared_bytes();
}

void gradient_probabilities(DType dtype, const GradientOperands& operands, const GradientScores& tile, CUstream_st* stream) {
  require(operands.head_dim % kChunk == 0 && operands.head_dim <= kMostDimAtOnce,
          "gradient_probabilities: head_dim must be 8, 16, ... 128");
  switch (dtype) {
    case DType::fp16:
      return launch_for<__half>(operands, tile, stream);
    case DType::bf16:
      return launch_for<__nv_bfloat16>(operands, tile, stream);
    case DType::fp32:
      break;
  }
  require(false, "gradient_probabilities: the tensor cores multiply 16 bits");
}

}  // namespace annulus::kernels::cuda
