// SPDX-License-Identifier: Apache-2.0
// Where the rows of a permuted sequence enter and leave: between the order of the files and that of the plan.
#pragma once

#include <annulus/job/communicator.hpp>
#include <annulus/pattern/partition.hpp>
#include <annulus/pattern/permutation.hpp>
#include <annulus/pattern/progression.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace annulus {

/// How processes share the rows of a file: each has a contiguous range, and takes it from front to back in as many rounds as the others.
struct FileRounds {
  std::int64_t seq_len = 0;
  std::int64_t processes = 1;
  std::int64_t rows = 1;  ///< of a process in a round, at most

  std::int64_t rounds() const;
  Progression part(std::int64_t process, std::int64_t round) const;
};

/// Moves rows of one batch entry between processes that read and write contiguous ranges of them, in the order of the files, and processes
/// that own their positions. Both ways go in rounds: no process holds more than a few times `most_bytes`, or a row for every process where
/// that is more, besides what it owns.
///
/// A process alone owns all positions, whatever ranks of the ring it runs. Everything here is collective, and the functions given are
/// called on each process as often as on the others. Where one throws, all processes throw the same AgreedError.
class RowExchange {
 public:
  static constexpr std::int64_t kMostBytes = std::int64_t{8} << 20;

  /// All arguments must outlive it.
  RowExchange(const Communicator& comm, const Permutation& order, const Partition& partition, std::int64_t most_bytes = kMostBytes);

  /// Reads `count` neighbouring rows of the file, of row_bytes each.
  using ReadRows = std::function<void(std::int64_t first, std::int64_t count, std::byte* rows)>;
  /// Takes, or gives, the rows of some positions that this process owns, in this order.
  using PlaceRows = std::function<void(std::span<const std::int64_t> positions, const std::byte* rows)>;
  using FetchRows = std::function<void(std::span<const std::int64_t> positions, std::byte* rows)>;
  /// Takes the rows of this process's part of the file in a round, as they stand there.
  using TakeRows = std::function<void(std::int64_t round, const std::byte* rows)>;

  /// From the file to those who own the rows. Each process reads its range once, front to back; every position is placed once.
  void spread(std::int64_t row_bytes, const ReadRows& read, const PlaceRows& place) const;
  /// From those who own the rows to the file. Each process takes its range once, front to back. `take` may itself be collective, and is
  /// called without rows where a process has none left; it must not throw.
  void collect(std::int64_t row_bytes, const FetchRows& fetch, const TakeRows& take) const;

  /// Which rows of the file a process reads or writes when.
  FileRounds file_rounds(std::int64_t row_bytes) const { return file_rounds(order_.seq_len(), comm_.size(), row_bytes, most_bytes_); }
  static FileRounds file_rounds(std::int64_t seq_len, std::int64_t processes, std::int64_t row_bytes, std::int64_t most_bytes = kMostBytes);

  /// Bytes that spread() and collect() take at most, of seq_len rows of row_bytes.
  static std::int64_t bytes(const Communicator& comm, std::int64_t seq_len, std::int64_t row_bytes);

 private:
  /// A row of the file: who owns it and where, and its number in the part.
  struct Move {
    std::int64_t owner = 0;
    std::int64_t position = 0;
    std::int64_t in_part = 0;
  };
  /// By owner, then by position.
  std::vector<Move> moves_of(const Progression& rows) const;
  /// Calls turn(moves, moves to each owner) until all processes have had all of theirs: no owner gets more from a process at a time than
  /// what makes `most_bytes` from all.
  template <class Turn>
  void in_turns(const std::vector<Move>& moves, std::int64_t row_bytes, Turn&& turn) const;

  const Communicator& comm_;
  const Permutation& order_;
  const Partition& partition_;
  std::int64_t most_bytes_;
};

}  // namespace annulus
