// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

namespace annulus {

/// Largest part of a message that one MPI call moves: MPI-3 counts are int, some MPI transports dislike messages near 2 GiB, and parts show
/// the watchdog that a long message moves.
inline constexpr std::int64_t kMessageChunkBytes = std::int64_t{1} << 28;

/// Calls move(offset, count) for the parts of a message of `bytes` bytes, in order; none if it is empty. Sender and receiver cut alike.
template <class Move>
void for_each_message_chunk(std::int64_t bytes, Move&& move) {
  for (std::int64_t offset = 0; offset < bytes; offset += kMessageChunkBytes) {
    move(offset, static_cast<int>(std::min(kMessageChunkBytes, bytes - offset)));
  }
}

}  // namespace annulus
