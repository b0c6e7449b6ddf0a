// SPDX-License-Identifier: Apache-2.0
// One instantiation of the kernel, behind a plain function.
#pragma once

#include "check.hpp"
#include "kernel.cuh"

namespace annulus::kernels::cuda::fused {

template <class Element, int kIndex>
void launch_tiles(const TensorMaps& maps, const Arguments& args, int blocks, cudaStream_t stream) {
  using P = Plan<kIndex>;
  ANNULUS_KERNELS_CHECK(cudaFuncSetAttribute(attend_tiles<Element, kIndex>, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kBytes));
  attend_tiles<Element, kIndex><<<blocks, P::kThreads, P::kBytes, stream>>>(maps, args);
  check_launch("attend_tiles");
}

}  // namespace annulus::kernels::cuda::fused
