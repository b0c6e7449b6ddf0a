// SPDX-License-Identifier: Apache-2.0
// Where chunks end along an axis, so that what is read at a time ends there too and no chunk is decoded twice.
#pragma once

#include <annulus/io/source.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// Chunks that hold every step-th index of [begin, end) of an axis. They begin at `begin` and where (index - phase) is a multiple of
/// `chunk`.
struct ChunkGrid {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t chunk = 1;
  std::int64_t phase = 0;
  std::int64_t step = 1;

  bool operator==(const ChunkGrid&) const = default;
};

/// Stretches of [0, seq_len) of which no chunk of any grid reaches over an end of chunk_rows, whose rows are yet to be set. Where grids
/// lie across each other, and where there are too many chunks to look at, chunk_rows are `most` and chunks do reach over.
std::vector<RowBands::Stretch> chunk_stretches(const std::vector<ChunkGrid>& grids, std::int64_t seq_len, std::int64_t most);

}  // namespace annulus
