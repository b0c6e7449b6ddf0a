// SPDX-License-Identifier: Apache-2.0
#include "chunk_grid.hpp"

#include <algorithm>
#include <utility>

namespace annulus {

namespace {

/// Chunks that are looked at one by one.
constexpr std::int64_t kMostChunks = std::int64_t{1} << 20;

struct Rows {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// Every chunk of every grid, ascending. Empty if there are too many.
std::vector<Rows> chunks_of(const std::vector<ChunkGrid>& grids) {
  std::vector<Rows> chunks;
  for (const ChunkGrid& grid : grids) {
    if ((grid.end - grid.begin) / grid.chunk + 2 > kMostChunks - std::ssize(chunks)) { return {}; }
    for (std::int64_t row = grid.begin; row < grid.end;) {
      const std::int64_t behind = ((row - grid.phase) % grid.chunk + grid.chunk) % grid.chunk;
      const std::int64_t next = row + grid.chunk - behind;
      chunks.push_back({row, std::min(grid.end, next - grid.step + 1)});
      row = next;
    }
  }
  std::sort(chunks.begin(), chunks.end(), [](const Rows& a, const Rows& b) { return a.begin < b.begin; });
  return chunks;
}

}  // namespace

std::vector<RowBands::Stretch> chunk_stretches(const std::vector<ChunkGrid>& grids, std::int64_t seq_len, std::int64_t most) {
  std::vector<RowBands::Stretch> stretches{{0, most, 0}};
  if (grids.size() == 1 && grids.front() == ChunkGrid{0, seq_len, most}) { return stretches; }
  const std::vector<Rows> chunks = chunks_of(grids);
  if (chunks.empty()) { return stretches; }
  stretches.clear();
  // Chunks that lie over one another are one. Equal ones in a row are a stretch, which a shorter one may end.
  std::int64_t place = 0;
  bool ended = true;
  const auto add = [&](std::int64_t end) {
    const std::int64_t rows = end - place;
    const bool crossed = rows > 2 * most;
    const std::int64_t unit = crossed ? most : rows;
    if (ended || (place - stretches.back().first) % stretches.back().chunk_rows != 0 || unit > stretches.back().chunk_rows) {
      stretches.push_back({place, unit, 0});
    }
    ended = crossed || unit < stretches.back().chunk_rows;
    place = end;
  };
  for (std::size_t index = 0; index < chunks.size();) {
    const std::int64_t begin = chunks[index].begin;
    std::int64_t end = chunks[index].end;
    for (++index; index < chunks.size() && chunks[index].begin < end; ++index) { end = std::max(end, chunks[index].end); }
    if (begin > place) { add(begin); }
    if (end > place) { add(end); }
  }
  if (seq_len > place) { add(seq_len); }
  return stretches;
}

}  // namespace annulus
