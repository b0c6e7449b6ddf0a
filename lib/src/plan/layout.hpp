// SPDX-License-Identifier: Apache-2.0
// Where blocks lie while they travel, and the messages that carry them.
#pragma once

#include "routes/routes.hpp"

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace annulus::planning {

/// Messages start at multiples of this inside a slot or send buffer, so that vector loads of a block's rows stay aligned.
inline constexpr std::int64_t kMessageAlignment = 256;

/// Where a message begins behind one that ends at `end`.
inline std::int64_t aligned(std::int64_t end) { return ceil_div(end, kMessageAlignment) * kMessageAlignment; }

/// @throws InvalidArgument if `bytes` more at `offset_bytes` were beyond 2^60, so that no sum of places and sizes can pass 2^63
void require_message(std::int64_t bytes, std::int64_t offset_bytes, std::int64_t rank, std::int64_t peer);

/// Gives steps the slots in which they receive. What comes for step t is posted before the work of step t - ahead, so a slot serves again
/// ahead + 1 steps after what came in it was last met.
class SlotChooser {
 public:
  explicit SlotChooser(std::int64_t ahead) : ahead_(ahead) { in_use_until_.fill(-ahead); }
  /// The slot of a step, whose blocks are last met in step `last_use`. Steps ascend.
  std::size_t take(std::int64_t step, std::int64_t last_use);

 private:
  std::array<std::int64_t, kSlots.size()> in_use_until_{};
  std::int64_t ahead_;
};

/// Where so many KV heads of some rows begin in BufferId::resident, if they are a piece of the shard as it lies there.
std::optional<std::int64_t> place_in_resident(const Setting& setting, const Rows<Global>& rows, std::int64_t kv_heads);

struct Layout {
  List<BlockPlace> places;  ///< by block, of received ones
  List<Step> steps;         ///< packs, sends and receives; as many as there are with something to move or to attend, at least one
  std::array<std::int64_t, kSlots.size()> slot_bytes{};
  std::array<std::int64_t, kSendBuffers.size()> send_bytes{};
};

/// Of this number, which is made if there are fewer.
Step& step_of(Layout& layout, std::int64_t number);

/// Adds a block to the end of a message.
void append_block(Message& message, std::int64_t block, const Setting& setting, const Routes& routes);

/// Where the message that comes after these in a buffer begins.
std::int64_t end_of(const std::vector<Message>& messages);

/// Adds a message to the sends of a step: its blocks are sent from where they lie if that is one range and nothing else is in the message,
/// else they are packed.
void add_send(Message message, std::int64_t number, const Setting& setting, const Routes& routes, Layout& layout);

/// Gathers each step's hops into messages: receives one after another in the slot that is free;
/// sends straight from where their blocks lie if those are neighbours in one buffer, else packed into the step's send buffer.
/// @throws InvalidArgument if more than 2^60 bytes were to travel in one step
Layout lay_out(const Setting& setting, const Routes& routes);

}  // namespace annulus::planning
