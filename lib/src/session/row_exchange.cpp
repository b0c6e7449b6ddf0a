// SPDX-License-Identifier: Apache-2.0
#include "row_exchange.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cstring>
#include <exception>
#include <tuple>

namespace annulus {

namespace {

constexpr auto kNumberBytes = static_cast<std::int64_t>(sizeof(std::int64_t));

/// Keeps the first failure and leaves out what comes after it: a process that failed goes on to take part until all know of it.
class Guard {
 public:
  template <class Body>
  void operator()(Body&& body) {
    if (failure_) { return; }
    try {
      body();
    } catch (...) { failure_ = std::current_exception(); }
  }
  const std::exception_ptr& failure() const { return failure_; }

 private:
  std::exception_ptr failure_;
};

std::vector<std::int64_t> scaled(std::span<const std::int64_t> counts, std::int64_t factor) {
  std::vector<std::int64_t> products(counts.begin(), counts.end());
  for (std::int64_t& product : products) { product *= factor; }
  return products;
}

/// The numbers that came, all ranks' one after the other, and how many of each rank.
struct Numbers {
  std::vector<std::int64_t> values;
  std::vector<std::int64_t> counts;
};

Numbers exchange_numbers(const Communicator& comm, std::span<const std::int64_t> values, std::span<const std::int64_t> counts) {
  const FromAll from = comm.all_to_all(std::as_bytes(values), scaled(counts, kNumberBytes));
  Numbers numbers;
  numbers.values.resize(from.data.size() / sizeof(std::int64_t));
  // Nothing may have come, and memcpy takes no null pointers.
  std::copy(from.data.begin(), from.data.end(), std::as_writable_bytes(std::span(numbers.values)).begin());
  for (const std::int64_t bytes : from.bytes) { numbers.counts.push_back(bytes / kNumberBytes); }
  return numbers;
}

}  // namespace

RowExchange::RowExchange(const Communicator& comm, const Permutation& order, const Partition& partition, std::int64_t most_bytes)
    : comm_(comm), order_(order), partition_(partition), most_bytes_(most_bytes) {
  ANNULUS_EXPECTS(comm.size() == 1 || comm.size() == partition.ranks(), "{} processes and a partition among {}", comm.size(),
                  partition.ranks());
}

std::int64_t FileRounds::rounds() const { return ceil_div(split_by_rank(seq_len, processes, 0).count, rows); }

Progression FileRounds::part(std::int64_t process, std::int64_t round) const {
  const Progression own = split_by_rank(seq_len, processes, process);
  const std::int64_t begin = std::min(own.count, round * rows);
  const std::int64_t end = std::min(own.count, begin + rows);
  return range(own.first + begin, own.first + end);
}

FileRounds RowExchange::file_rounds(std::int64_t seq_len, std::int64_t processes, std::int64_t row_bytes, std::int64_t most_bytes) {
  return {seq_len, processes, std::max<std::int64_t>(1, most_bytes / row_bytes)};
}

std::int64_t RowExchange::bytes(const Communicator& comm, std::int64_t seq_len, std::int64_t row_bytes) {
  const std::int64_t owned = split_by_rank(seq_len, comm.size(), 0).count + 1;  // the pieces of zigzag may be one row longer together
  const std::int64_t rows = std::min(owned, std::max(kMostBytes / row_bytes, comm.size()));
  // The part; what goes and what comes, each once more in the buffers of the all-to-all; numbers and moves of as many rows.
  return rows * (5 * row_bytes + 4 * kNumberBytes + static_cast<std::int64_t>(sizeof(Move)));
}

std::vector<RowExchange::Move> RowExchange::moves_of(const Progression& rows) const {
  std::vector<Move> moves;
  moves.reserve(static_cast<std::size_t>(rows.count));
  for (std::int64_t i = 0; i < rows.count; ++i) {
    const std::int64_t position = order_.position_of(rows[i]);
    moves.push_back({comm_.size() == 1 ? 0 : partition_.owner(position), position, i});
  }
  std::sort(moves.begin(), moves.end(),
            [](const Move& a, const Move& b) { return std::tie(a.owner, a.position) < std::tie(b.owner, b.position); });
  return moves;
}

template <class Turn>
void RowExchange::in_turns(const std::vector<Move>& moves, std::int64_t row_bytes, Turn&& turn) const {
  const auto owners = static_cast<std::size_t>(comm_.size());
  const std::int64_t most = std::max<std::int64_t>(1, file_rounds(row_bytes).rows / comm_.size());
  std::vector<std::int64_t> left(owners, 0);
  for (const Move& move : moves) { ++left[static_cast<std::size_t>(move.owner)]; }
  const std::int64_t turns = comm_.max(ceil_div(*std::max_element(left.begin(), left.end()), most));
  std::vector<Move> some;
  std::vector<std::int64_t> counts(owners);
  for (std::int64_t number = 0; number < turns; ++number) {
    some.clear();
    auto begin = moves.begin();  // of an owner's moves
    for (std::size_t owner = 0; owner < owners; ++owner) {
      const std::int64_t done = std::min(left[owner], number * most);
      counts[owner] = std::min(most, left[owner] - done);
      some.insert(some.end(), begin + done, begin + done + counts[owner]);
      begin += left[owner];
    }
    turn(some, counts);
  }
}

void RowExchange::spread(std::int64_t row_bytes, const ReadRows& read, const PlaceRows& place) const {
  Guard guarded;
  std::vector<std::byte> rows;
  std::vector<std::byte> leaving;
  std::vector<std::int64_t> positions;
  const FileRounds file = file_rounds(row_bytes);
  for (std::int64_t round = 0; round < file.rounds(); ++round) {
    const Progression own = file.part(comm_.rank(), round);
    rows.resize(static_cast<std::size_t>(own.count * row_bytes));
    guarded([&] {
      if (own.count > 0) { read(own.first, own.count, rows.data()); }
    });
    comm_.agree(guarded.failure());
    in_turns(moves_of(own), row_bytes, [&](const std::vector<Move>& moves, const std::vector<std::int64_t>& counts) {
      positions.clear();
      leaving.clear();
      for (const Move& move : moves) {
        positions.push_back(move.position);
        const auto row = rows.begin() + move.in_part * row_bytes;
        leaving.insert(leaving.end(), row, row + row_bytes);
      }
      const Numbers to_place = exchange_numbers(comm_, positions, counts);
      const FromAll come = comm_.all_to_all(leaving, scaled(counts, row_bytes));
      guarded([&] { place(to_place.values, come.data.data()); });
    });
  }
  comm_.agree(guarded.failure());
}

void RowExchange::collect(std::int64_t row_bytes, const FetchRows& fetch, const TakeRows& take) const {
  Guard guarded;
  std::vector<std::byte> rows;
  std::vector<std::byte> fetched;
  std::vector<std::int64_t> positions;
  const FileRounds file = file_rounds(row_bytes);
  for (std::int64_t round = 0; round < file.rounds(); ++round) {
    const Progression own = file.part(comm_.rank(), round);
    rows.resize(static_cast<std::size_t>(own.count * row_bytes));
    in_turns(moves_of(own), row_bytes, [&](const std::vector<Move>& moves, const std::vector<std::int64_t>& counts) {
      positions.clear();
      for (const Move& move : moves) { positions.push_back(move.position); }
      const Numbers asked_for = exchange_numbers(comm_, positions, counts);
      fetched.resize(asked_for.values.size() * static_cast<std::size_t>(row_bytes));
      guarded([&] { fetch(asked_for.values, fetched.data()); });
      const FromAll come = comm_.all_to_all(fetched, scaled(asked_for.counts, row_bytes));
      // They come as they were asked for.
      const std::byte* row = come.data.data();
      for (const Move& move : moves) {
        std::memcpy(rows.data() + move.in_part * row_bytes, row, static_cast<std::size_t>(row_bytes));
        row += row_bytes;
      }
    });
    comm_.agree(guarded.failure());
    take(round, rows.data());
  }
}

}  // namespace annulus
