// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/pattern/progression.hpp>
#include <annulus/pattern/rows.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// A run of a shard's rows: global rows and the local index of the first; local indices follow the order of `global`.
struct ShardPiece {
  Progression global;
  std::int64_t local_first = 0;
  bool operator==(const ShardPiece&) const = default;
};

/// The tokens one rank owns, in local order.
struct Shard {
  std::vector<ShardPiece> pieces;
  std::int64_t rows() const;
  bool operator==(const Shard&) const = default;
};

/// The piece of a shard that holds a local row.
const ShardPiece& piece_at(const Shard& shard, std::int64_t local_row);

/// Where global rows stand in a shard. Each run of them must lie in one piece of the shard; numbers keep their order.
Rows<Local> local_rows(const Shard& shard, const Rows<Global>& rows);

/// Where global rows stand in a block that holds the rows `block`. Each run of them must lie in one run of the block.
Rows<Packed> packed_rows(const Rows<Global>& block, const Rows<Global>& rows);

/// The contiguous rows of `rank`: seq_len / ranks of them, one more for the first seq_len mod ranks ranks. Ranks beyond seq_len get none.
Progression split_by_rank(std::int64_t seq_len, std::int64_t ranks, std::int64_t rank);

/// Who owns which token.
class Partition {
 public:
  /// @throws InvalidArgument if seq_len < 1 or ranks < 1
  Partition(PartitionKind kind, std::int64_t seq_len, std::int64_t ranks);

  PartitionKind kind() const { return kind_; }
  std::int64_t seq_len() const { return seq_len_; }
  std::int64_t ranks() const { return ranks_; }
  /// Pieces without rows are left out.
  Shard shard(std::int64_t rank) const;
  std::int64_t rows(std::int64_t rank) const;
  std::int64_t owner(std::int64_t global_row) const;

  /// Ranks that own rows of [begin, end), ascending.
  std::vector<std::int64_t> ranks_touching(std::int64_t begin, std::int64_t end) const;

  /// Whether a rank's rows are neighbours of each other in one piece or two, and not of other ranks' rows all along.
  bool keeps_neighbours() const { return kind_ != PartitionKind::striped || ranks_ == 1; }

  bool operator==(const Partition&) const = default;

 private:
  /// Pieces into which the sequence is cut, one or two for a rank; without meaning where ranks own stripes.
  std::int64_t pieces() const;
  std::int64_t piece_of(std::int64_t global_row) const;
  std::int64_t owner_of_piece(std::int64_t piece) const;

  PartitionKind kind_;
  std::int64_t seq_len_;
  std::int64_t ranks_;
};

}  // namespace annulus
