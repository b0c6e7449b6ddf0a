// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"
#include "element.cuh"
#include "extents.hpp"
#include "gradient_scores.cuh"

namespace annulus::kernels::cuda {
namespace {

constexpr int kWarps = 4;

/// One warp per row, 128 columns at a time, four of a lane. In 16 bits the results of some columns lie where scores of lower columns were,
/// which have been read by then; only the first columns' lie where other lanes still read, so all lanes read before one writes.
template <class Element>
__global__ void __launch_bounds__(32 * kWarps) gradient_scores_kernel(const __grid_constant__ GradientScores tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  if (row >= tile.rows) { return; }
  const auto instance = static_cast<std::int64_t>(blockIdx.y);
  float* const scores = tile.scores + instance * tile.instance_stride + row * tile.ld;
  float* const products = tile.products + instance * tile.instance_stride + row * tile.ld;
  const std::int64_t stat = instance * tile.stat_instance_stride + row * tile.stat_row_stride;
  const float max = __ldg(tile.max + stat);
  const float sum = __ldg(tile.sum + stat);
  const int visible = visible_of(tile, row);
  for (int first = 0; first < tile.cols; first += 128) {
    const int column = first + 4 * lane;
    const bool inside = column < tile.ld;
    float4 s = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    float4 product = s;
    if (inside) {
      s = __ldcg(reinterpret_cast<const float4*>(scores + column));
      product = __ldcg(reinterpret_cast<const float4*>(products + column));
    }
    float4 p;
    p.x = column < visible ? exp_fast(s.x - max) : 0.0F;
    p.y = column + 1 < visible ? exp_fast(s.y - max) : 0.0F;
    p.z = column + 2 < visible ? exp_fast(s.z - max) : 0.0F;
    p.w = column + 3 < visible ? exp_fast(s.w - max) : 0.0F;
    // What lies past the visible keys may be anything, also NaN.
    float4 ds;
    ds.x = column < visible ? tile.scale * p.x * (product.x - sum) : 0.0F;
    ds.y = column + 1 < visible ? tile.scale * p.y * (product.y - sum) : 0.0F;
    ds.z = column + 2 < visible ? tile.scale * p.z * (product.z - sum) : 0.0F;
    ds.w = column + 3 < visible ? tile.scale * p.w * (product.w - sum) : 0.0F;
    __syncwarp();
    if (inside) {
      store4(reinterpret_cast<Element*>(scores) + column, p);
      store4(reinterpret_cast<Element*>(products) + column, ds);
    }
  }
}

}  // namespace

void differentiate_scores(DType dtype, const GradientScores& tile, CUstream_st* stream) {
  const dim3 grid(static_cast<unsigned>((tile.rows + kWarps - 1) / kWarps), static_cast<unsigned>(tile.instances));
  with_device_element(dtype, [&](auto tag) { gradient_scores_kernel<decltype(tag)><<<grid, 32 * kWarps, 0, stream>>>(tile); });
  check_launch("gradient_scores_kernel");
}

}  // namespace annulus::kernels::cuda
