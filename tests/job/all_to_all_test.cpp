// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

using namespace annulus;

namespace {

/// How many bytes rank `from` has for rank `to`: none for some, many for others.
std::int64_t bytes_between(std::int64_t from, std::int64_t to, std::int64_t unit) { return (3 * from + 5 * to) % 4 * unit; }

std::byte byte_between(std::int64_t from, std::int64_t to, std::int64_t place) {
  return static_cast<std::byte>((17 * from + 29 * to + place + place / 251) % 256);
}

void expect_all_arrives(std::int64_t unit, std::int64_t most_bytes) {
  const Communicator& comm = test::world();
  std::vector<std::byte> data;
  std::vector<std::int64_t> bytes;
  for (std::int64_t to = 0; to < comm.size(); ++to) {
    bytes.push_back(bytes_between(comm.rank(), to, unit));
    for (std::int64_t place = 0; place < bytes.back(); ++place) { data.push_back(byte_between(comm.rank(), to, place)); }
  }

  const FromAll from = comm.all_to_all(data, bytes, most_bytes);

  REQUIRE(static_cast<std::int64_t>(from.bytes.size()) == comm.size());
  std::size_t at = 0;
  for (std::int64_t rank = 0; rank < comm.size(); ++rank) {
    INFO("from rank " << rank);
    REQUIRE(from.bytes[static_cast<std::size_t>(rank)] == bytes_between(rank, comm.rank(), unit));
    std::int64_t wrong = 0;
    for (std::int64_t place = 0; place < bytes_between(rank, comm.rank(), unit); ++place, ++at) {
      wrong += from.data[at] == byte_between(rank, comm.rank(), place) ? 0 : 1;
    }
    CHECK(wrong == 0);
  }
  CHECK(at == from.data.size());
}

}  // namespace

TEST_CASE("every rank gets what the others have for it, in their order") {
  expect_all_arrives(1000, Communicator::kAllToAllBytes);
  expect_all_arrives(0, Communicator::kAllToAllBytes);
}

TEST_CASE("parts that do not fit one call arrive whole, in pieces") {
  for (const std::int64_t most_bytes : {1, 7, 64, 1000, 2999}) { expect_all_arrives(333, most_bytes); }
}

TEST_CASE("sizes that are not those of the data are refused before anything is sent") {
  const Communicator& comm = test::world();
  const std::vector<std::byte> data(3);
  const std::vector<std::int64_t> too_many(static_cast<std::size_t>(comm.size()) + 1, 0);
  const std::vector<std::int64_t> nothing(static_cast<std::size_t>(comm.size()), 0);
  CHECK_THROWS_AS(comm.all_to_all(data, too_many), InvalidArgument);
  CHECK_THROWS_AS(comm.all_to_all(data, nothing), InvalidArgument);
}
