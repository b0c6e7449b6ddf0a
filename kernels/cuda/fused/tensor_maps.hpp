// SPDX-License-Identifier: Apache-2.0
// Tensor maps: how the copy engine sees an operand. [batch, rows, heads, head_dim] becomes, innermost first, (head_dim, head, row of a
// residue class, residue, batch): dilated rows are neighbours in a class, so a box of them is one copy. A box is 64 columns wide, 128 bytes
// swizzled; columns past head_dim and rows past the end of a class arrive as zeros.
#pragma once

#include <annulus/kernels/fused.hpp>

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace annulus::kernels::cuda::fused {

/// The maps of a launch, a parameter of the kernel.
struct TensorMaps {
  CUtensorMap map[kMaxMaps];
};

/// @throws LibraryError if the driver lacks the function or refuses the map
CUtensorMap encode(const MapRequest& request, const Operand& operand, DType dtype, std::int64_t head_dim);

/// Launches the kernel of one element and one line of kTileShapes; defined in launch.cuh, instantiated in a file for each pair.
/// @throws LibraryError if the launch fails
template <class Element, int kIndex>
void launch_tiles(const TensorMaps& maps, const Arguments& args, int blocks, cudaStream_t stream);

}  // namespace annulus::kernels::cuda::fused
