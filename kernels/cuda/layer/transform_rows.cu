// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/cuda_layer.hpp>

#include "check.hpp"
#include "element.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace annulus::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr std::int64_t kMostPairs = 128;  // of a head of 256
constexpr std::int64_t kMostBlocks = std::int64_t{1} << 30;

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) { value += __shfl_xor_sync(0xffffffffU, value, distance); }
  return value;
}

/// Who shares a group of numbers that are normalised together: all threads of a block, or those of a warp.
template <bool kWholeBlock>
struct Team {
  int index;    ///< of the thread
  int threads;  ///< of the team
  float* s_sums;

  /// The sum over the team, on all its threads, in the same order on all.
  __device__ float sum(float value) const {
    value = warp_sum(value);
    if constexpr (kWholeBlock) {
      __syncthreads();  // an earlier sum may still be read
      if (index % kWarp == 0) { s_sums[index / kWarp] = value; }
      __syncthreads();
      value = 0.0F;
      for (int warp = 0; warp < kWarps; ++warp) { value += s_sums[warp]; }
    }
    return value;
  }
};

__device__ __forceinline__ float gate_of(Gate gate, float z) {
  switch (gate) {
    case Gate::sigmoid:
      return 1.0F / (1.0F + expf(-z));
    case Gate::tanh:
      return tanhf(z);
    case Gate::relu:
      return z < 0.0F ? 0.0F : z;  // NaN stays NaN
    case Gate::gelu:
      return z * 0.5F * erfcf(-z * 0.70710678F);
    case Gate::none:
      break;
  }
  return 1.0F;
}

/// One block takes a row. Its groups go to the whole block (a group is the row) or to warps (a group is a head).
template <class In, class Out, bool kWholeBlock>
__global__ void __launch_bounds__(kThreads) transform_kernel(const __grid_constant__ TransformTask task, std::int64_t first_row) {
  __shared__ float s_sums[kWarps];
  __shared__ float2 s_turns[kMostPairs];
  const std::int64_t row = first_row + blockIdx.x;
  const auto* in = static_cast<const In*>(task.in) + row * task.features;
  auto* out = static_cast<Out*>(task.out) + row * task.features;
  const float* gate = task.gate == Gate::none ? nullptr : task.gate_in + row * task.features;
  const auto pairs = static_cast<int>(task.head_dim / 2);
  if (task.rotary != RotaryPairs::none) {
    for (int pair = static_cast<int>(threadIdx.x); pair < pairs; pair += kThreads) {
      const double angle = static_cast<double>(task.first_position + row) *
                           pow(task.rotary_base, -2.0 * static_cast<double>(pair) / static_cast<double>(task.head_dim));
      double sine = 0;
      double cosine = 0;
      sincos(angle, &sine, &cosine);
      s_turns[pair] = make_float2(static_cast<float>(cosine), static_cast<float>(sine));
    }
    __syncthreads();
  }

  const auto thread = static_cast<int>(threadIdx.x);
  const Team<kWholeBlock> team{kWholeBlock ? thread : thread % kWarp, kWholeBlock ? kThreads : kWarp, s_sums};
  const std::int64_t count = task.norm == Norm::none ? task.features : task.norm_features;
  const std::int64_t groups = task.features / count;
  const auto biased = [&](std::int64_t i) { return widened(in[i]) + (task.bias == nullptr ? 0.0F : __ldg(task.bias + i)); };
  for (std::int64_t group = kWholeBlock ? 0 : thread / kWarp; group < groups; group += kWholeBlock ? 1 : kWarps) {
    const std::int64_t begin = group * count;
    float mean = 0.0F;
    float factor = 1.0F;
    if (task.norm != Norm::none) {
      if (task.norm == Norm::layer) {
        float sum = 0.0F;
        for (std::int64_t i = team.index; i < count; i += team.threads) { sum += biased(begin + i); }
        mean = team.sum(sum) / static_cast<float>(count);
      }
      float squares = 0.0F;
      for (std::int64_t i = team.index; i < count; i += team.threads) {
        const float distance = biased(begin + i) - mean;
        squares += distance * distance;
      }
      factor = 1.0F / sqrtf(team.sum(squares) / static_cast<float>(count) + static_cast<float>(task.norm_epsilon));
    }
    const auto normalised = [&](std::int64_t i) {
      const float value = biased(begin + i);
      if (task.norm == Norm::none) { return value; }
      const float weight = task.norm_weight == nullptr ? 1.0F : __ldg(task.norm_weight + i);
      const float bias = task.norm_bias == nullptr ? 0.0F : __ldg(task.norm_bias + i);
      return (value - mean) * factor * weight + bias;
    };
    for (std::int64_t i = team.index; i < count; i += team.threads) {
      float value = normalised(i);
      if (task.rotary != RotaryPairs::none) {
        // The other element of the pair is computed again: it lies with another thread, and in the first-level cache.
        const auto place = static_cast<int>(i % task.head_dim);
        const bool neighbours = task.rotary == RotaryPairs::neighbouring;
        const bool second = neighbours ? place % 2 == 1 : place >= pairs;
        const int distance = neighbours ? 1 : pairs;
        const float2 turn = s_turns[neighbours ? place / 2 : place - (second ? pairs : 0)];
        const float other = normalised(second ? i - distance : i + distance);
        value = value * turn.x + (second ? other : -other) * turn.y;
      }
      if (gate != nullptr) {
        const float bias = task.gate_bias == nullptr ? 0.0F : __ldg(task.gate_bias + begin + i);
        value *= gate_of(task.gate, (gate[begin + i] + bias) / static_cast<float>(task.gate_temperature));
      }
      out[begin + i] = to_element<Out>(value);
    }
  }
}

template <class In, class Out>
void launch(const TransformTask& task, CUstream_st* stream) {
  const bool of_heads = task.norm != Norm::none && task.norm_features < task.features;
  for (std::int64_t first = 0; first < task.rows; first += kMostBlocks) {
    const auto blocks = static_cast<unsigned>(std::min(kMostBlocks, task.rows - first));
    if (of_heads) {
      transform_kernel<In, Out, false><<<blocks, kThreads, 0, stream>>>(task, first);
    } else {
      transform_kernel<In, Out, true><<<blocks, kThreads, 0, stream>>>(task, first);
    }
    check_launch("transform_kernel");
  }
}

}  // namespace

void transform_rows(const TransformTask& task, CUstream_st* stream) {
  if (task.rows == 0) { return; }
  with_device_element(task.in_dtype, [&](auto in) {
    with_device_element(task.out_dtype, [&](auto out) { launch<decltype(in), decltype(out)>(task, stream); });
  });
}

}  // namespace annulus::kernels::cuda
