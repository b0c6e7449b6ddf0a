// SPDX-License-Identifier: Apache-2.0
// Where blocks lie while they travel, and the messages that carry them.
#pragma once

#include "routes/routes.hpp"

#include <array>
#include <cstdint>
#include <vector>

namespace annulus::planning {

/// Messages start at multiples of this inside a slot or send buffer, so that vector loads of a block's rows stay aligned.
inline constexpr std::int64_t kMessageAlignment = 256;

/// @throws InvalidArgument if `bytes` more at `offset_bytes` were beyond 2^60, so that no sum of places and sizes can pass 2^63
void require_message(std::int64_t bytes, std::int64_t offset_bytes, std::int64_t rank, std::int64_t peer);

struct Layout {
  std::vector<BlockPlace> places;  ///< by block, of received ones
  std::vector<Step> steps;         ///< packs, sends and receives; as many as there are with something to move or to attend, at least one
  std::array<std::int64_t, kSlots.size()> slot_bytes{};
  std::array<std::int64_t, kSendBuffers.size()> send_bytes{};
};

/// Gathers each step's hops into messages: receives one after another in the slot that is free, by preference number t mod 2 in step t;
/// sends straight from where their blocks lie if those are neighbours in one buffer, else packed into the step's send buffer.
/// @throws InvalidArgument if more than 2^60 bytes were to travel in one step
Layout lay_out(const Setting& setting, const Routes& routes);

}  // namespace annulus::planning
