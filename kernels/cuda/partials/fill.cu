// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"
#include "element.cuh"
#include "row_layout.cuh"

#include <cstdint>

namespace annulus::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsAtOnce = 8;

/// Writes `value` to the floats of one array; `vectors` of them as float4, the rest singly.
__device__ __forceinline__ void fill(float* data, std::int64_t count, float value, bool aligned) {
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t vectors = aligned ? count / 4 : 0;
  const float4 four = make_float4(value, value, value, value);
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * (kThreads * kVectorsAtOnce) + threadIdx.x; i < vectors;
       i += threads * kVectorsAtOnce) {
#pragma unroll
    for (int u = 0; u < kVectorsAtOnce; ++u) {
      if (i + u * kThreads < vectors) { reinterpret_cast<float4*>(data)[i + u * kThreads] = four; }
    }
  }
  for (std::int64_t i = 4 * vectors + thread; i < count; i += threads) { data[i] = value; }
}

__global__ void __launch_bounds__(kThreads) fill_identity_kernel(float* acc, float* max, float* sum, std::int64_t rows,
                                                                 std::int64_t head_dim, bool acc_aligned, bool stats_aligned) {
  fill(acc, rows * head_dim, 0.0F, acc_aligned);
  fill(max, rows, -INFINITY, stats_aligned);
  fill(sum, rows, 0.0F, stats_aligned);
}

__global__ void __launch_bounds__(kThreads) add_zero_keys_kernel(const __grid_constant__ ZeroKeysTask task, std::int64_t rows) {
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows; i += threads) {
    std::int64_t rest = i;
    const auto next = [&](std::int64_t extent) {
      const std::int64_t index = rest % extent;
      rest /= extent;
      return index;
    };
    std::int64_t at = next(task.rows) * task.strides.row;
    at += next(task.segments) * task.strides.segment;
    at += next(task.q_per_kv) * task.strides.head;
    at += next(task.kv_heads) * task.strides.kv_head;
    at += rest * task.strides.batch;
    static_cast<float*>(task.max)[at] = 0.0F;
    static_cast<float*>(task.sum)[at] += static_cast<float>(task.count);
  }
}

}  // namespace

bool built_for_current_device() noexcept {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&fill_identity_kernel));
  if (status != cudaSuccess) { static_cast<void>(cudaGetLastError()); }
  return status == cudaSuccess;
}

void fill_identity(const PartialPointers& partial, std::int64_t rows, std::int64_t head_dim, CUstream_st* stream) {
  if (rows <= 0) { return; }
  constexpr std::int64_t kFloatsPerBlock = std::int64_t{4} * kThreads * kVectorsAtOnce;
  constexpr std::int64_t kMostBlocks = 1 << 20;
  const std::int64_t blocks = std::min(kMostBlocks, (rows * head_dim + kFloatsPerBlock - 1) / kFloatsPerBlock);
  fill_identity_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<float*>(partial.acc), static_cast<float*>(partial.max), static_cast<float*>(partial.sum), rows, head_dim,
      is_aligned(partial.acc, 16), is_aligned(partial.max, 16) && is_aligned(partial.sum, 16));
  check_launch("fill_identity_kernel");
}

void add_zero_keys(const ZeroKeysTask& task, CUstream_st* stream) {
  const std::int64_t rows = task.batch * task.segments * task.rows * task.kv_heads * task.q_per_kv;
  if (rows <= 0) { return; }
  constexpr std::int64_t kMostBlocks = 1 << 16;
  const std::int64_t blocks = std::min<std::int64_t>(kMostBlocks, (rows + kThreads - 1) / kThreads);
  add_zero_keys_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(task, rows);
  check_launch("add_zero_keys_kernel");
}

}  // namespace annulus::kernels::cuda
