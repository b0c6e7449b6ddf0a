// SPDX-License-Identifier: Apache-2.0
#include "tiling.hpp"

#include "extents.hpp"

#include <algorithm>
#include <array>

namespace annulus::kernels::cuda {
namespace {

constexpr std::int64_t kMostTileRows = 65535;  // instances are a grid's y extent
constexpr std::int64_t kAlignment = 256;

std::int64_t score_bytes(const CublasTiling& tiling) { return round_up(tiling.rows * round_up(tiling.k_tile, 128) * 4, kAlignment); }

}  // namespace

std::int64_t pointer_array_bytes(const CublasTiling& tiling) {
  return round_up(tiling.rows * static_cast<std::int64_t>(sizeof(void*)), kAlignment);
}
std::int64_t lane_bytes(const CublasTiling& tiling) {
  return score_bytes(tiling) + 5 * pointer_array_bytes(tiling) + kLibraryWorkspaceBytes;
}

void validate(const CublasTiling& tiling) {
  require(tiling.streams >= 1 && tiling.streams <= kMostStreams, "CublasTiling: streams must be 1..8");
  require(tiling.rows >= 1 && tiling.rows <= kMostTileRows, "CublasTiling: rows must be 1..65535");
  require(tiling.q_tile >= 1 && tiling.causal_q_tile >= 1, "CublasTiling: q_tile and causal_q_tile must be positive");
  require(tiling.k_tile >= 1 && tiling.k_tile <= kMostTileKeys, "CublasTiling: k_tile must be 1..4096");
}

CublasTiling default_tiling(std::int64_t head_dim, DType dtype, Mask mask) {
  struct Row {
    std::int64_t largest_head_dim;
    CublasTiling dense;
    CublasTiling causal;
  };
  // Fastest of `annulus_cuda_rates --sweep` on an H100 with bf16. Scores in flight = streams * rows * k_tile * 4 bytes: 32 MiB of its 50 MB
  // of L2. A list of one mask ignores the q_tile of the other; those of a mixed one stay sensible.
  static constexpr std::array<Row, 3> kHalf{{
      {64, {1, 4096, 2048, 512, 2048}, {1, 8192, 2048, 512, 1024}},
      {128, {1, 4096, 2048, 512, 2048}, {1, 8192, 2048, 512, 1024}},
      {256, {2, 2048, 2048, 512, 2048}, {1, 4096, 2048, 512, 2048}},
  }};
  // fp32 products are ten times slower: everything else is hidden, and the tiles need only fill the machine.
  static constexpr CublasTiling kSingle{2, 2048, 1024, 512, 2048};
  switch (dtype) {
    case DType::fp32:
      return kSingle;
    case DType::fp16:
    case DType::bf16:
      break;
  }
  const auto* row = std::find_if(kHalf.begin(), kHalf.end() - 1, [&](const Row& each) { return head_dim <= each.largest_head_dim; });
  switch (mask) {
    case Mask::causal:
      return row->causal;
    case Mask::none:
      break;
  }
  return row->dense;
}

std::int64_t CublasAttention::workspace_bytes(const CublasTiling& tiling) { return tiling.streams * lane_bytes(tiling); }

}  // namespace annulus::kernels::cuda
