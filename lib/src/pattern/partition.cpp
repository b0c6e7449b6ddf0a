// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/partition.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <numeric>

namespace annulus {

std::int64_t Shard::rows() const {
  return std::accumulate(pieces.begin(), pieces.end(), std::int64_t{0},
                         [](std::int64_t sum, const ShardPiece& piece) { return sum + piece.global.count; });
}

const ShardPiece& piece_at(const Shard& shard, std::int64_t local_row) {
  const auto piece = std::find_if(shard.pieces.begin(), shard.pieces.end(), [&](const ShardPiece& each) {
    return local_row >= each.local_first && local_row < each.local_first + each.global.count;
  });
  ANNULUS_ASSERT(piece != shard.pieces.end(), "local row {} lies in no piece of the shard", local_row);
  return *piece;
}

Rows<Local> local_rows(const Shard& shard, const Rows<Global>& rows) {
  Rows<Local> local;
  for (std::int64_t i = 0; i < rows.runs(); ++i) {
    const Progression& run = rows.run(i);
    const auto piece = std::find_if(shard.pieces.begin(), shard.pieces.end(), [&](const ShardPiece& each) {
      return each.global.contains(run.first) && each.global.contains(run.last());
    });
    ANNULUS_ASSERT(piece != shard.pieces.end(), "rows {}+{}*{} lie in no piece of the shard", run.first, run.stride, run.count);
    Progression indices = indices_of(run, piece->global);
    indices.first += piece->local_first;
    local.append(indices);
  }
  return local;
}

Rows<Packed> packed_rows(const Rows<Global>& block, const Rows<Global>& rows) {
  Rows<Packed> packed;
  for (std::int64_t i = 0; i < rows.runs(); ++i) {
    const Progression& run = rows.run(i);
    std::int64_t before = 0;
    std::int64_t holder = 0;
    while (holder < block.runs() && !(block.run(holder).contains(run.first) && block.run(holder).contains(run.last()))) {
      before += block.run(holder++).count;
    }
    ANNULUS_ASSERT(holder < block.runs(), "rows {}+{}*{} lie in no run of the block", run.first, run.stride, run.count);
    Progression indices = indices_of(run, block.run(holder));
    indices.first += before;
    packed.append(indices);
  }
  return packed;
}

Progression split_by_rank(std::int64_t seq_len, std::int64_t ranks, std::int64_t rank) {
  const std::int64_t base = seq_len / ranks;
  const std::int64_t spare = seq_len % ranks;
  const std::int64_t begin = rank * base + std::min(rank, spare);
  return range(begin, begin + base + (rank < spare ? 1 : 0));
}

Partition::Partition(PartitionKind kind, std::int64_t seq_len, std::int64_t ranks) : kind_(kind), seq_len_(seq_len), ranks_(ranks) {
  ANNULUS_EXPECTS(kind != PartitionKind::automatic, "a partition of kind auto");
  ANNULUS_EXPECTS(seq_len >= 1, "seq-len {} is not positive", seq_len);
  ANNULUS_EXPECTS(ranks >= 1, "{} ranks are not positive", ranks);
}

std::int64_t Partition::pieces() const {
  switch (kind_) {
    case PartitionKind::zigzag:
      return ranks_ == 1 ? 1 : 2 * ranks_;  // one rank owns neighbours
    case PartitionKind::contiguous:
    case PartitionKind::striped:
    case PartitionKind::automatic:
      break;
  }
  return ranks_;
}

std::int64_t Partition::owner_of_piece(std::int64_t piece) const { return piece < ranks_ ? piece : pieces() - 1 - piece; }

Shard Partition::shard(std::int64_t rank) const {
  ANNULUS_EXPECTS(rank >= 0 && rank < ranks_, "rank {} is outside 0..{}", rank, ranks_ - 1);
  Shard shard;
  if (!keeps_neighbours()) {
    const std::int64_t rows = rank < seq_len_ ? (seq_len_ - 1 - rank) / ranks_ + 1 : 0;
    if (rows > 0) { shard.pieces.push_back({{rank, rows == 1 ? 1 : ranks_, rows}, 0}); }
    return shard;
  }
  const auto add = [&](std::int64_t piece) {
    const Progression rows = split_by_rank(seq_len_, pieces(), piece);
    if (!rows.empty()) { shard.pieces.push_back({rows, shard.rows()}); }
  };
  add(rank);
  if (pieces() > ranks_) { add(pieces() - 1 - rank); }
  return shard;
}

std::int64_t Partition::rows(std::int64_t rank) const { return shard(rank).rows(); }

std::int64_t Partition::piece_of(std::int64_t global_row) const {
  ANNULUS_EXPECTS(global_row >= 0 && global_row < seq_len_, "row {} is outside 0..{}", global_row, seq_len_ - 1);
  const std::int64_t base = seq_len_ / pieces();
  const std::int64_t spare = seq_len_ % pieces();
  const std::int64_t in_large = spare * (base + 1);
  return global_row < in_large ? global_row / (base + 1) : spare + (global_row - in_large) / base;
}

std::int64_t Partition::owner(std::int64_t global_row) const {
  const std::int64_t piece = piece_of(global_row);  // is within the sequence
  return keeps_neighbours() ? owner_of_piece(piece) : global_row % ranks_;
}

std::vector<std::int64_t> Partition::ranks_touching(std::int64_t begin, std::int64_t end) const {
  std::vector<std::int64_t> touching;
  if (begin >= end) { return touching; }
  if (!keeps_neighbours()) {
    for (std::int64_t row = begin; row < std::min(end, begin + ranks_); ++row) { touching.push_back(owner(row)); }
    std::sort(touching.begin(), touching.end());
    return touching;
  }
  for (std::int64_t piece = piece_of(begin); piece <= piece_of(end - 1); ++piece) { touching.push_back(owner_of_piece(piece)); }
  std::sort(touching.begin(), touching.end());
  touching.erase(std::unique(touching.begin(), touching.end()), touching.end());
  return touching;
}

}  // namespace annulus
