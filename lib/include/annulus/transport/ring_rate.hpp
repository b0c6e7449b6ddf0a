// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/device/device.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include <cstdint>

namespace annulus {

/// What a transport reaches between neighbours of the ring, all ranks sending and receiving at once.
struct RingRate {
  std::int64_t bytes = 0;        ///< of a message
  double transport_gbs = 0;      ///< 10^9 bytes a second of a rank, by the median of several messages and the slowest rank
  double copy_gbs = 0;           ///< a copy of as many bytes within a rank's own memory, all ranks at once, counted once
  std::int64_t wrong_bytes = 0;  ///< of all ranks' last messages
};

/// Passes messages of `bytes` bytes around the ring of `comm`, from every rank to the next, looks at what arrived and times it. The same on
/// all ranks. Collective. @param transport  of all ranks of `comm` @throws AgreedError if there is no memory
RingRate measure_ring(const Communicator& comm, Device& device, Transport& transport, std::int64_t bytes);

}  // namespace annulus
