// SPDX-License-Identifier: Apache-2.0
// Keys of zeros, which the fused kernel adds to a row when its partial is closed.
#pragma once

#include "element.cuh"

#include <cuda_runtime.h>

namespace annulus::kernels::cuda::fused {

/// A row's maximum (times c) and sum with `count` keys of score 0 besides; returns the factor that O takes for the new maximum.
__device__ __forceinline__ float add_zero_keys(float& max, float& sum, float count) {
  const float larger = fmaxf(max, 0.0F);
  const float factor = exp2_fast(max - larger);
  sum = sum * factor + count * exp2_fast(-larger);
  max = larger;
  return factor;
}

}  // namespace annulus::kernels::cuda::fused
