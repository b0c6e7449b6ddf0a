// SPDX-License-Identifier: Apache-2.0
#include <annulus/device/device.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/make_transport.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

using namespace annulus;

TEST_CASE("a message of more than 2 GiB between two ranks arrives intact") {
  const Communicator& comm = test::world();
  REQUIRE(comm.size() == 2);
  const auto backend = make_device({.kind = BackendKind::reference, .threads = 1, .number = 0});
  const auto queue = backend->make_queue();
  const auto transport = make_transport(TransportKind::mpi, comm, *backend, false);
  const std::int64_t words = ((std::int64_t{1} << 31) + 4096) / 8 + 3;
  std::vector<std::uint64_t> data(static_cast<std::size_t>(words));
  const auto value = [](std::int64_t i) { return static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15U; };
  std::vector<Outgoing> sends;
  std::vector<Incoming> receives;
  if (comm.rank() == 0) {
    for (std::int64_t i = 0; i < words; ++i) { data[static_cast<std::size_t>(i)] = value(i); }
    sends.push_back({1, reinterpret_cast<const std::byte*>(data.data()), words * 8});
  } else {
    receives.push_back({0, reinterpret_cast<std::byte*>(data.data()), words * 8});
  }

  transport->ready(1, *queue);
  transport->post(1, sends, receives);
  transport->wait(1, *queue);

  CHECK(transport->traffic(1).bytes_received == (comm.rank() == 1 ? words * 8 : 0));
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < words; ++i) { wrong += data[static_cast<std::size_t>(i)] == value(i) ? 0 : 1; }
  CHECK(wrong == 0);
}

TEST_CASE("an all-to-all of more than 2 GiB between two ranks arrives intact") {
  const Communicator& comm = test::world();
  REQUIRE(comm.size() == 2);
  const std::int64_t words = ((std::int64_t{1} << 31) + 4096) / 8 + 3;
  const auto value = [](std::int64_t i) { return static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15U; };
  std::vector<std::uint64_t> data;
  for (std::int64_t i = 0; comm.rank() == 0 && i < words; ++i) { data.push_back(value(i)); }

  const FromAll from = comm.all_to_all(std::as_bytes(std::span(data)), std::vector<std::int64_t>{0, comm.rank() == 0 ? words * 8 : 0});

  CHECK(from.bytes == std::vector<std::int64_t>{comm.rank() == 1 ? words * 8 : 0, 0});
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; comm.rank() == 1 && i < words; ++i) {
    std::uint64_t came = 0;
    std::memcpy(&came, from.data.data() + i * 8, 8);
    wrong += came == value(i) ? 0 : 1;
  }
  CHECK(wrong == 0);
}
