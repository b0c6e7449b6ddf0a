// SPDX-License-Identifier: Apache-2.0
#include "layout.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <map>
#include <optional>

namespace annulus::planning {

namespace {

std::int64_t aligned_end(const Message& message) { return aligned(message.offset_bytes + message.bytes); }

/// Where blocks lie that are neither resident rows nor received.
void place_extra_keys(Layout& layout, const Setting& setting, const Routes& routes) {
  for (std::int64_t block = 0; block < std::ssize(routes.blocks); ++block) {
    if (setting.problem.is_extra(routes.blocks[block].rows_global[0])) { layout.places[block] = {block, BufferId::extra, 0}; }
  }
}

const KvBlock& block_of(const Routes& routes, std::int64_t index) { return routes.blocks[index]; }

/// The last step in which queries meet something that came in a step, by the latter.
std::map<std::int64_t, std::int64_t> last_uses(const Routes& routes) {
  List<std::int64_t> of_block(routes.blocks.size(), 0);
  for (const Use& use : routes.uses) {
    if (use.block < 0) { continue; }
    std::int64_t& last = of_block[use.block];
    last = std::max(last, use.step);
  }
  std::map<std::int64_t, std::int64_t> of_step;
  for (const Hop& hop : routes.receives) {
    std::int64_t& last = of_step[hop.step];
    last = std::max(last, of_block[hop.block]);
  }
  return of_step;
}

bool send_in_place(Message& message, const Setting& setting, const Routes& routes, const Layout& layout) {
  const auto place_of = [&](std::int64_t block) -> std::optional<BlockPlace> {
    const KvBlock& what = block_of(routes, block);
    if (what.owner != setting.rank || setting.problem.is_extra(what.rows_global[0])) { return layout.places[block]; }
    const std::optional<std::int64_t> offset = place_in_resident(setting, what.rows_global, what.kv_heads.count);
    if (!offset) { return std::nullopt; }
    return BlockPlace{block, BufferId::resident, *offset};
  };
  const std::optional<BlockPlace> first = place_of(message.blocks.front());
  if (!first) { return false; }
  std::int64_t expected = first->offset_bytes;
  for (const std::int64_t block : message.blocks) {
    const std::optional<BlockPlace> place = place_of(block);
    if (!place || place->buffer != first->buffer || place->offset_bytes != expected) { return false; }
    expected += block_of(routes, block).bytes;
  }
  message.buffer = first->buffer;
  message.offset_bytes = first->offset_bytes;
  return true;
}

void send_packed(Message& message, std::int64_t number, const Setting& setting, const Routes& routes, Layout& layout) {
  Step& current = step_of(layout, number);
  message.buffer = kSendBuffers[number % 2];
  message.offset_bytes = 0;
  for (const Message& earlier : current.sends) {
    if (earlier.buffer == message.buffer) { message.offset_bytes = std::max(message.offset_bytes, aligned_end(earlier)); }
  }
  require_message(message.bytes, message.offset_bytes, setting.rank, message.peer);
  std::int64_t offset = message.offset_bytes;
  for (const std::int64_t block : message.blocks) {
    const KvBlock& what = block_of(routes, block);
    PackItem pack{block, BufferId::resident, 0, {}, message.buffer, offset};
    if (what.owner == setting.rank && !setting.problem.is_extra(what.rows_global[0])) {
      pack.from_rows = local_rows(setting.shard, what.rows_global);
    } else {
      const BlockPlace& place = layout.places[block];
      pack.from = place.buffer;
      pack.from_offset_bytes = place.offset_bytes;
    }
    current.packs.push_back(std::move(pack));
    offset += what.bytes;
  }
  std::int64_t& size = layout.send_bytes[number % 2];
  size = std::max(size, message.offset_bytes + message.bytes);
}

/// A message for every run of hops between the same ranks in the same step: begin(step), append_hop(message, hop) for each, end(message,
/// step).
template <class Begin, class Append, class End>
void for_each_message(const std::vector<Hop>& hops, Begin&& begin, Append&& append_hop, End&& end) {
  for (auto hop = hops.begin(); hop != hops.end();) {
    const std::int64_t number = hop->step;
    Message message = begin(number);
    message.peer = hop->peer;
    for (; hop != hops.end() && hop->step == number && hop->peer == message.peer; ++hop) { append_hop(message, *hop); }
    end(std::move(message), number);
  }
}

}  // namespace

void require_message(std::int64_t bytes, std::int64_t offset_bytes, std::int64_t rank, std::int64_t peer) {
  constexpr std::int64_t kMost = std::int64_t{1} << 60;
  ANNULUS_EXPECTS(bytes <= kMost - offset_bytes, "rank {} would exchange more than 2^60 bytes with rank {} in one step", rank, peer);
}

Step& step_of(Layout& layout, std::int64_t number) {
  if (std::ssize(layout.steps) <= number) { layout.steps.resize(number + 1); }
  return layout.steps[number];
}

void append_block(Message& message, std::int64_t block, const Setting& setting, const Routes& routes) {
  message.blocks.push_back(block);
  message.bytes += block_of(routes, block).bytes;
  require_message(message.bytes, message.offset_bytes, setting.rank, message.peer);
}

std::int64_t end_of(const std::vector<Message>& messages) { return messages.empty() ? 0 : aligned_end(messages.back()); }

void add_send(Message message, std::int64_t number, const Setting& setting, const Routes& routes, Layout& layout) {
  const bool blocks_alone = message.gradients.empty();
  if (!blocks_alone || !send_in_place(message, setting, routes, layout)) { send_packed(message, number, setting, routes, layout); }
  step_of(layout, number).sends.push_back(std::move(message));
}

std::optional<std::int64_t> place_in_resident(const Setting& setting, const Rows<Global>& rows, std::int64_t kv_heads) {
  if (kv_heads != setting.problem.kv_heads) { return std::nullopt; }
  const auto piece = std::find_if(setting.shard.pieces.begin(), setting.shard.pieces.end(),
                                  [&](const ShardPiece& each) { return Rows<Global>(each.global) == rows; });
  if (piece == setting.shard.pieces.end()) { return std::nullopt; }
  return resident_offset(setting.problem, *piece);
}

std::size_t SlotChooser::take(std::int64_t step, std::int64_t last_use) {
  // In turn, while each serves one step.
  auto slot = static_cast<std::size_t>(step % (ahead_ + 1));
  for (std::size_t other = 0; other < kSlots.size() && in_use_until_[slot] + ahead_ + 1 > step; ++other) { slot = other; }
  ANNULUS_ASSERT(in_use_until_[slot] + ahead_ + 1 <= step, "no slot is free in step {}", step);
  in_use_until_[slot] = last_use;
  return slot;
}

Layout lay_out(const Setting& setting, const Routes& routes) {
  Layout layout;
  layout.steps.resize(routes.uses.empty() ? 1 : routes.uses.back().step + 1);
  layout.places.resize(routes.blocks.size());
  place_extra_keys(layout, setting, routes);
  SlotChooser slots(steps_ahead(setting.routing.schedule));
  const std::map<std::int64_t, std::int64_t> last_use = last_uses(routes);
  std::size_t slot = 0;  // of the present step
  for_each_message(
      routes.receives,
      [&](std::int64_t number) {
        const Step& current = step_of(layout, number);
        if (current.receives.empty()) { slot = slots.take(number, last_use.at(number)); }
        Message message;
        message.buffer = kSlots[slot];
        message.offset_bytes = end_of(current.receives);
        return message;
      },
      [&](Message& message, const Hop& hop) {
        layout.places[hop.block] = {hop.block, message.buffer, message.offset_bytes + message.bytes};
        append_block(message, hop.block, setting, routes);
      },
      [&](Message message, std::int64_t number) {
        layout.slot_bytes[slot] = std::max(layout.slot_bytes[slot], message.offset_bytes + message.bytes);
        step_of(layout, number).receives.push_back(std::move(message));
      });
  for_each_message(
      routes.sends, [](std::int64_t /*number*/) { return Message{}; },
      [&](Message& message, const Hop& hop) { append_block(message, hop.block, setting, routes); },
      [&](Message message, std::int64_t number) { add_send(std::move(message), number, setting, routes, layout); });
  return layout;
}

}  // namespace annulus::planning
