// SPDX-License-Identifier: Apache-2.0
#include "softmax.cuh"

namespace annulus::kernels::cuda {

template void softmax_tile_as<Bf16>(const SoftmaxTile&, CUstream_st*);

}  // namespace annulus::kernels::cuda
