// SPDX-License-Identifier: Apache-2.0
#include "softmax.cuh"

namespace annulus::kernels::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) fill_pointers_kernel(const __grid_constant__ PointerTile tile) {
  const int instance = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (instance >= tile.instances) { return; }
  const InstanceOffsets at = offsets_of(tile.map, instance);
  tile.to.k[instance] = tile.k + at.kv * tile.element_size;
  tile.to.q[instance] = tile.q + at.q * tile.element_size;
  tile.to.v[instance] = tile.v + at.kv * tile.element_size;
  tile.to.scores[instance] = tile.scores + instance * tile.instance_stride;
  tile.to.acc[instance] = tile.acc + at.acc;
}

}  // namespace

void fill_pointers(const PointerTile& tile, CUstream_st* stream) {
  const auto blocks = static_cast<unsigned>((tile.instances + kThreads - 1) / kThreads);
  fill_pointers_kernel<<<blocks, kThreads, 0, stream>>>(tile);
  check_launch("fill_pointers_kernel");
}

void softmax_tile(DType dtype, const SoftmaxTile& tile, CUstream_st* stream) {
  with_element(dtype, [&](auto tag) { softmax_tile_as<decltype(tag)>(tile, stream); });
}

}  // namespace annulus::kernels::cuda
