// SPDX-License-Identifier: Apache-2.0
#include "tiling.hpp"

#include <annulus/kernels/built_for.hpp>

#include "extents.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

namespace annulus::kernels::cuda {
namespace {

constexpr std::int64_t kMostTileRows = 65535;  // instances are a grid's y extent
constexpr std::int64_t kAlignment = 256;

std::int64_t score_bytes(const CublasTiling& tiling) { return round_up(tiling.rows * round_up(tiling.k_tile, 128) * 4, kAlignment); }
std::int64_t pointer_array_bytes(const CublasTiling& tiling) {
  return round_up(tiling.rows * static_cast<std::int64_t>(sizeof(void*)), kAlignment);
}

}  // namespace

LaneLayout lane_layout(const CublasTiling& tiling) {
  std::int64_t end = kLibraryWorkspaceBytes;
  const auto part = [&](std::int64_t bytes) { return std::exchange(end, end + bytes); };
  LaneLayout layout;
  for (std::int64_t LaneLayout::* array : {&LaneLayout::k, &LaneLayout::q, &LaneLayout::v, &LaneLayout::score_rows, &LaneLayout::acc}) {
    layout.*array = part(pointer_array_bytes(tiling));
  }
  layout.scores = part(score_bytes(tiling));
  layout.bytes = end;
  return layout;
}

std::int64_t score_row_stride(std::int64_t cols) { return round_up(cols, 32); }

void validate(const CublasTiling& tiling) {
  require(tiling.streams >= 1 && tiling.streams <= kMostStreams, "CublasTiling: streams must be 1..8");
  require(tiling.rows >= 1 && tiling.rows <= kMostTileRows, "CublasTiling: rows must be 1..65535");
  require(tiling.q_tile >= 1 && tiling.causal_q_tile >= 1, "CublasTiling: q_tile and causal_q_tile must be positive");
  require(tiling.k_tile >= 1 && tiling.k_tile <= kMostTileKeys, "CublasTiling: k_tile must be 1..4096");
}

CublasTiling default_tiling(std::int64_t head_dim, DType dtype, Mask mask) {
  struct Row {
    CublasTiling dense;
    CublasTiling causal;
  };
  // By kTunedHeadDims, up to each of them. Fastest of `annulus_cuda_rates --sweep` on an H100 with bf16. Scores in flight = streams * rows
  // * k_tile * 4 bytes: 32 MiB of its 50 MB of L2. A list of one mask ignores the q_tile of the other; those of a mixed one stay sensible.
  static constexpr std::array<Row, kTunedHeadDims.size()> kHalf{{
      {{1, 4096, 2048, 512, 2048}, {1, 8192, 2048, 512, 1024}},
      {{1, 4096, 2048, 512, 2048}, {1, 8192, 2048, 512, 1024}},
      {{2, 2048, 2048, 512, 2048}, {1, 4096, 2048, 512, 2048}},
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
  const auto* fits = std::find_if(kTunedHeadDims.begin(), kTunedHeadDims.end() - 1, [&](std::int64_t dim) { return head_dim <= dim; });
  const Row& row = kHalf[static_cast<std::size_t>(fits - kTunedHeadDims.begin())];
  switch (mask) {
    case Mask::causal:
      return row.causal;
    case Mask::none:
      break;
  }
  return row.dense;
}

CublasTiling default_gradient_tiling(DType dtype) {
  switch (dtype) {
    case DType::fp32:
      return {2, 4096, 1024, 512, 2048};
    case DType::fp16:
    case DType::bf16:
      break;
  }
  // On an H200 with bf16, 16 heads of 128 and 8,192 tokens, the fastest of tilings that take no more than this, 256 MiB for both streams:
  // 0.96 of those that take four times as much. Smaller tiles would stay in the L2 cache, but their products leave processors without work.
  return {2, 16384, 4096, 2048, 2048};
}

std::int64_t CublasAttention::workspace_bytes(const CublasTiling& tiling) { return tiling.streams * lane_layout(tiling).bytes; }

}  // namespace annulus::kernels::cuda
