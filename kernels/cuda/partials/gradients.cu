// SPDX-License-Identifier: Apache-2.0
// What a backward pass does around its products.
#include <annulus/kernels/cuda.hpp>

#include "check.hpp"
#include "element.cuh"
#include "extents.hpp"
#include "row_layout.cuh"

#include <cstdint>

namespace annulus::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 256;

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) { value += __shfl_xor_sync(0xffffffffU, value, step); }
  return value;
}

__device__ __forceinline__ float number(float value) { return value; }
__device__ __forceinline__ float number(__half value) { return __half2float(value); }
__device__ __forceinline__ float number(__nv_bfloat16 value) { return __bfloat162float(value); }

/// One warp per (batch, row, head).
template <class Element>
__global__ void __launch_bounds__(32 * kWarps) begin_gradients_kernel(const RowBox box, const __grid_constant__ BeginGradientsTask task) {
  const std::uint32_t index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= box.count) { return; }
  const int lane = static_cast<int>(threadIdx.x % 32);
  const RowPlace place = box.place(index);
  const FinishTask& forward = task.forward;
  const std::int64_t begin = place.acc * forward.head_dim;
  const auto* const dout = static_cast<const Element*>(task.dout) + begin;

  float largest = -INFINITY;
  float covering = 0.0F;
  for (int g = 0; g < forward.partials; ++g) {
    const bool empty = static_cast<const float*>(forward.partial[g].sum)[place.stat] == 0.0F;
    const float max = static_cast<const float*>(forward.partial[g].max)[place.stat];
    largest = empty ? largest : fmaxf(largest, max);
    covering += empty ? 0.0F : 1.0F;
  }
  __syncwarp();  // max is overwritten from here on
  const float averaged = forward.combine == Combine::mean && covering > 0.0F ? covering : 1.0F;
  const float log_factor = logf(static_cast<float>(forward.output_scale) / averaged);
  float total = 0.0F;
  float weighted = 0.0F;
  for (int g = 0; g < forward.partials; ++g) {
    float* const max_at = static_cast<float*>(forward.partial[g].max) + place.stat;
    float* const sum_at = static_cast<float*>(forward.partial[g].sum) + place.stat;
    const float max = *max_at;
    const float sum = *sum_at;
    const auto* const acc = static_cast<const float*>(forward.partial[g].acc) + begin;
    float product = 0.0F;
    if (sum != 0.0F) {
      for (std::int64_t d = lane; d < forward.head_dim; d += 32) { product += acc[d] * number(dout[d]); }
    }
    product = sum_of_warp(product);
    if (sum != 0.0F) {
      const float weight = expf(max - largest);
      total += weight * sum;
      weighted += weight * product;
    }
    if (lane == 0) {
      *max_at = sum == 0.0F ? INFINITY : max + logf(sum) - log_factor;
      *sum_at = sum == 0.0F ? 0.0F : product / sum;
    }
  }
  if (lane == 0 && forward.combine == Combine::lse) {
    for (int g = 0; g < forward.partials; ++g) {
      float* const max_at = static_cast<float*>(forward.partial[g].max) + place.stat;
      if (*max_at == INFINITY) { continue; }
      *max_at = largest + logf(total) - log_factor;
      static_cast<float*>(forward.partial[g].sum)[place.stat] = weighted / total;
    }
  }
  auto* const dq = static_cast<float*>(forward.partial[0].acc) + begin;
  for (std::int64_t d = lane; d < forward.head_dim; d += 32) { dq[d] = 0.0F; }
}

__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ AddTask task, std::int64_t count) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) { return; }
  const std::int64_t d = index % task.head_dim;
  const std::int64_t head = index / task.head_dim % task.heads;
  const std::int64_t row = index / task.head_dim / task.heads % task.rows;
  const std::int64_t batch = index / task.head_dim / task.heads / task.rows;
  task.dst[batch * task.dst_batch_stride + row * task.dst_row_stride + head * task.dst_head_stride + d] += task.src[index];
}

template <class Element>
__global__ void __launch_bounds__(kThreads) round_kernel(const float* src, Element* dst, std::int64_t count) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < count) { dst[index] = to_element<Element>(src[index]); }
}

unsigned blocks_of(std::int64_t count) { return static_cast<unsigned>(to_int(ceil_div(count, kThreads))); }

}  // namespace

void begin_gradients(const BeginGradientsTask& task, CUstream_st* stream) {
  const FinishTask& forward = task.forward;
  with_device_element(forward.dtype, [&](auto tag) {
    for_each_row_box(forward.batch, forward.rows, forward.heads, [&](const RowBox& box) {
      begin_gradients_kernel<decltype(tag)><<<(box.count + kWarps - 1) / kWarps, 32 * kWarps, 0, stream>>>(box, task);
      check_launch("begin_gradients_kernel");
    });
  });
}

void clear(const ClearTask& task, CUstream_st* stream) {
  ANNULUS_KERNELS_CHECK(cudaMemsetAsync(task.data, 0, static_cast<std::size_t>(task.count) * sizeof(float), stream));
}

void add(const AddTask& task, CUstream_st* stream) {
  const std::int64_t count = task.batch * task.rows * task.heads * task.head_dim;
  if (count == 0) { return; }
  add_kernel<<<blocks_of(count), kThreads, 0, stream>>>(task, count);
  check_launch("add_kernel");
}

void round(const RoundTask& task, CUstream_st* stream) {
  require(task.source_bytes == 4, "RoundTask: the device has numbers of 4 bytes");
  if (task.count == 0) { return; }
  with_device_element(task.dtype, [&](auto tag) {
    round_kernel<<<blocks_of(task.count), kThreads, 0, stream>>>(static_cast<const float*>(task.src), static_cast<decltype(tag)*>(task.dst),
                                                                 task.count);
  });
  check_launch("round_kernel");
}

}  // namespace annulus::kernels::cuda
