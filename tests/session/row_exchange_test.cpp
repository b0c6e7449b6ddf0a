// SPDX-License-Identifier: Apache-2.0
#include "session/row_exchange.hpp"

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <span>
#include <string>
#include <vector>

using namespace annulus;
using annulus::test::world;

namespace {

constexpr std::int64_t kWords = 3;
constexpr std::int64_t kRowBytes = kWords * 8;

/// Word `word` of a row: no two are alike.
std::int64_t word_of(std::int64_t row, std::int64_t word) { return 1000003 * row + word; }

void write_row(std::int64_t row, std::byte* to) {
  for (std::int64_t word = 0; word < kWords; ++word) {
    const std::int64_t value = word_of(row, word);
    std::memcpy(to + word * 8, &value, 8);
  }
}

bool is_row(std::int64_t row, const std::byte* from) {
  std::vector<std::byte> expected(static_cast<std::size_t>(kRowBytes));
  write_row(row, expected.data());
  return std::memcmp(from, expected.data(), expected.size()) == 0;
}

struct Setting {
  SequenceOrder kind = SequenceOrder::hilbert;
  PartitionKind partition = PartitionKind::contiguous;
  std::int64_t seq_len = 1;
  std::int64_t most_bytes = 1;
};

std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const SequenceOrder kind :
       {SequenceOrder::linear, SequenceOrder::hilbert, SequenceOrder::hilbert_inverse, SequenceOrder::bit_reversal}) {
    for (const PartitionKind partition : {PartitionKind::contiguous, PartitionKind::zigzag, PartitionKind::striped}) {
      for (const std::int64_t seq_len : {1, 2, 3, 16, 101, 1000}) {
        for (const std::int64_t most_bytes : {std::int64_t{1}, 7 * kRowBytes, RowExchange::kMostBytes}) {
          all.push_back({kind, partition, seq_len, most_bytes});
        }
      }
    }
  }
  return all;
}

bool owns(const Partition& partition, std::int64_t position) { return partition.owner(position) == world().rank(); }

}  // namespace

TEST_CASE("every row comes to the process that owns its position, once, and each process reads its range once") {
  for (const Setting& setting : settings()) {
    const Permutation order(setting.kind, setting.seq_len);
    const Partition partition(setting.partition, setting.seq_len, world().size());
    const RowExchange exchange(world(), order, partition, setting.most_bytes);
    const Progression range = split_by_rank(setting.seq_len, world().size(), world().rank());
    std::int64_t next = range.first;
    std::set<std::int64_t> placed;
    bool right = true;
    exchange.spread(
        kRowBytes,
        [&](std::int64_t first, std::int64_t count, std::byte* rows) {
          right = right && first == next && count * kRowBytes <= std::max(setting.most_bytes, kRowBytes);
          next += count;
          for (std::int64_t i = 0; i < count; ++i) { write_row(first + i, rows + i * kRowBytes); }
        },
        [&](std::span<const std::int64_t> positions, const std::byte* rows) {
          for (const std::int64_t position : positions) {
            right = right && owns(partition, position) && placed.insert(position).second && is_row(order.row_at(position), rows);
            rows += kRowBytes;
          }
        });

    INFO(to_string(setting.kind) << ", " << to_string(setting.partition) << ", " << setting.seq_len << " rows, " << setting.most_bytes
                                 << " bytes");
    CHECK(right);
    CHECK(next == range.first + range.count);
    CHECK(static_cast<std::int64_t>(placed.size()) == partition.rows(world().rank()));
  }
}

TEST_CASE("every process takes its range in the order of the file, and all of them go through the rounds together") {
  for (const Setting& setting : settings()) {
    const Permutation order(setting.kind, setting.seq_len);
    const Partition partition(setting.partition, setting.seq_len, world().size());
    const RowExchange exchange(world(), order, partition, setting.most_bytes);
    std::int64_t next = split_by_rank(setting.seq_len, world().size(), world().rank()).first;
    const std::int64_t end = next + split_by_rank(setting.seq_len, world().size(), world().rank()).count;
    std::int64_t rounds = 0;
    bool right = true;
    exchange.collect(
        kRowBytes,
        [&](std::span<const std::int64_t> positions, std::byte* rows) {
          for (const std::int64_t position : positions) {
            right = right && owns(partition, position);
            write_row(order.row_at(position), rows);
            rows += kRowBytes;
          }
        },
        [&](std::int64_t round, const std::byte* rows) {
          const Progression part = exchange.file_rounds(kRowBytes).part(world().rank(), round);
          right = right && round == rounds++ && (part.empty() || part.first == next);
          for (std::int64_t i = 0; i < part.count; ++i, rows += kRowBytes) { right = right && is_row(next++, rows); }
        });

    INFO(to_string(setting.kind) << ", " << to_string(setting.partition) << ", " << setting.seq_len << " rows, " << setting.most_bytes
                                 << " bytes");
    CHECK(right);
    CHECK(next == end);
    CHECK(world().max(rounds) == rounds);
    CHECK(world().min(rounds) == rounds);
  }
}

TEST_CASE("a failure of one process is every process's, wherever it is") {
  const std::int64_t last = world().size() - 1;
  const Permutation order(SequenceOrder::bit_reversal, 200);
  const Partition partition(PartitionKind::contiguous, 200, world().size());
  const RowExchange exchange(world(), order, partition, 5 * kRowBytes);
  const auto fail_on_last = [&](const char* where) {
    if (world().rank() == last) { throw InvalidArgument(std::string("no ") + where); }
  };
  const auto message_of = [&](auto&& body) {
    try {
      body();
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::bad_input);
      return std::string(error.what());
    }
    return std::string();
  };
  const auto nothing = [](std::int64_t, std::int64_t, std::byte*) {};

  CHECK(message_of([&] {
          exchange.spread(
              kRowBytes, [&](std::int64_t, std::int64_t, std::byte*) { fail_on_last("reading"); },
              [](std::span<const std::int64_t>, const std::byte*) {});
        }) == "no reading");
  CHECK(message_of([&] {
          exchange.spread(kRowBytes, nothing, [&](std::span<const std::int64_t>, const std::byte*) { fail_on_last("placing"); });
        }) == "no placing");
  CHECK(message_of([&] {
          exchange.collect(
              kRowBytes, [&](std::span<const std::int64_t>, std::byte*) { fail_on_last("fetching"); },
              [](std::int64_t, const std::byte*) {});
        }) == "no fetching");
}
