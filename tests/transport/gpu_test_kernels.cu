// SPDX-License-Identifier: Apache-2.0
#include "gpu_test_kernels.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace annulus::test {

namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 2048;

/// Finaliser of splitmix64 (Steele, Lea & Flood 2014).
__device__ std::uint8_t pattern_byte(std::uint64_t seed, std::int64_t index) {
  std::uint64_t x = seed + 0x9e3779b97f4a7c15ULL * static_cast<std::uint64_t>(index + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return static_cast<std::uint8_t>((x ^ (x >> 31)) >> 56);
}

__global__ void fill_pattern_kernel(std::uint8_t* data, std::int64_t bytes, std::uint64_t seed) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += stride) {
    data[i] = pattern_byte(seed, i);
  }
}

__global__ void count_wrong_bytes_kernel(const std::uint8_t* data, std::int64_t bytes, std::uint64_t seed, unsigned long long* wrong) {
  unsigned long long found = 0;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += stride) {
    found += data[i] != pattern_byte(seed, i) ? 1 : 0;
  }
  if (found != 0) { atomicAdd(wrong, found); }
}

__device__ std::uint64_t nanoseconds() {
  std::uint64_t now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void keep_busy_kernel(std::uint64_t duration_ns) {
  const std::uint64_t start = nanoseconds();
  while (nanoseconds() - start < duration_ns) { __nanosleep(200); }
}

unsigned int blocks_for(std::int64_t bytes) {
  return static_cast<unsigned int>(std::clamp<std::int64_t>(bytes / kThreads, 1, kMostBlocks));
}

void check_launch() {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) { throw std::runtime_error(std::string("a test kernel was not launched: ") + cudaGetErrorString(status)); }
}

}  // namespace

void fill_pattern(cudaStream_t stream, std::byte* data, std::int64_t bytes, std::uint64_t seed) {
  fill_pattern_kernel<<<blocks_for(bytes), kThreads, 0, stream>>>(reinterpret_cast<std::uint8_t*>(data), bytes, seed);
  check_launch();
}

void count_wrong_bytes(cudaStream_t stream, const std::byte* data, std::int64_t bytes, std::uint64_t seed, unsigned long long* wrong) {
  count_wrong_bytes_kernel<<<blocks_for(bytes), kThreads, 0, stream>>>(reinterpret_cast<const std::uint8_t*>(data), bytes, seed, wrong);
  check_launch();
}

void keep_busy(cudaStream_t stream, std::int64_t microseconds) {
  keep_busy_kernel<<<1, 1, 0, stream>>>(static_cast<std::uint64_t>(microseconds) * 1000);
  check_launch();
}

}  // namespace annulus::test
