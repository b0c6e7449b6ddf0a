// SPDX-License-Identifier: Apache-2.0
#include "gradients.hpp"

#include <annulus/core/error.hpp>

#include "work.hpp"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

namespace annulus::planning {

namespace {

/// Steps from that in which a rank meets a block to that in which what it gives to the block's dK and dV leaves: in the one between comes
/// what those before it gave.
constexpr std::int64_t kStepsToSend = 2;
constexpr std::int64_t kStepsToCome = 1;

/// What travels between this rank and others: blocks, and their dK and dV.
enum class Load { block, gradient };
struct Passage {
  std::int64_t step = 0;
  std::int64_t peer = 0;
  Load load = Load::block;
  std::int64_t block = 0;
  auto operator<=>(const Passage&) const = default;
};

struct Passages {
  std::vector<Passage> receives;  ///< by step, peer, load and block
  std::vector<Passage> sends;
};

Passages passages_of(const Setting& setting, const Routes& routes, std::int64_t first) {
  Passages passages;
  const auto is_own = [&](std::int64_t block) { return routes.blocks[block].owner == setting.rank; };
  std::map<std::int64_t, std::int64_t> onward;  // where a block of another rank goes
  for (const Hop& hop : routes.sends) {
    passages.sends.push_back({first + hop.step, hop.peer, Load::block, hop.block});
    if (!is_own(hop.block)) { onward[hop.block] = hop.peer; }
  }
  for (const Hop& hop : routes.receives) {
    const std::int64_t owner = routes.blocks[hop.block].owner;
    const auto next = onward.find(hop.block);
    passages.receives.push_back({first + hop.step, hop.peer, Load::block, hop.block});
    if (hop.peer != owner) { passages.receives.push_back({first + hop.step + kStepsToCome, hop.peer, Load::gradient, hop.block}); }
    passages.sends.push_back({first + hop.step + kStepsToSend, next == onward.end() ? owner : next->second, Load::gradient, hop.block});
  }
  for (const Hop& hop : routes.ends) {
    passages.receives.push_back({first + hop.step + kStepsToSend, hop.peer, Load::gradient, hop.block});
  }
  std::sort(passages.receives.begin(), passages.receives.end());
  std::sort(passages.sends.begin(), passages.sends.end());
  return passages;
}

/// The steps' messages, and what is done with dK and dV of blocks.
class Builder {
 public:
  Builder(const Setting& setting, const Routes& routes, std::int64_t first, Layout& layout)
      : setting_(setting), routes_(routes), first_(first), layout_(layout), contributed_(routes.blocks.size()) {
    layout_.places.assign(routes.blocks.size(), {});
  }

  void lay_out() {
    const Passages passages = passages_of(setting_, routes_, first_);
    for_each_message(passages.receives, [&](auto begin, auto end) { receive(begin, end); });
    for_each_message(passages.sends, [&](auto begin, auto end) { send(begin, end); });
    add_sums();
  }

  /// The running dK and dV of a block of another rank.
  const BlockPlace& contributed(std::int64_t block) const { return contributed_[block]; }

 private:
  using Each = std::vector<Passage>::const_iterator;

  template <class Visit>
  void for_each_message(const std::vector<Passage>& passages, const Visit& visit) const {
    for (Each begin = passages.begin(), end = begin; begin != passages.end(); begin = end) {
      while (end != passages.end() && end->step == begin->step && end->peer == begin->peer) { ++end; }
      visit(begin, end);
    }
  }

  void append(Message& message, const Passage& passage) const {
    if (passage.load == Load::block) {
      append_block(message, passage.block, setting_, routes_);
      return;
    }
    message.gradients.push_back(passage.block);
    message.bytes += gradient_bytes(setting_.problem, routes_.blocks[passage.block].bytes);
    require_message(message.bytes, message.offset_bytes, setting_.rank, message.peer);
  }

  void receive(Each begin, Each end) {
    Step& step = step_of(layout_, begin->step);
    const std::size_t slot = static_cast<std::size_t>(begin->step % 2);
    Message message;
    message.peer = begin->peer;
    message.buffer = kSlots[slot];
    message.offset_bytes = end_of(step.receives);
    for (; begin != end; ++begin) {
      const BlockPlace place{begin->block, message.buffer, message.offset_bytes + message.bytes};
      if (begin->load == Load::block) {
        layout_.places[begin->block] = place;
      } else {
        came_.emplace_back(begin->step, place);
      }
      append(message, *begin);
    }
    std::int64_t& size = layout_.slot_bytes[slot];
    size = std::max(size, message.offset_bytes + message.bytes);
    step.receives.push_back(std::move(message));
  }

  void send(Each begin, Each end) {
    const std::int64_t number = begin->step;
    Message message;
    message.peer = begin->peer;
    for (; begin != end; ++begin) { append(message, *begin); }
    add_send(std::move(message), number, setting_, routes_, layout_);
    const Message& sent = layout_.steps[number].sends.back();
    std::int64_t offset = sent.offset_bytes;
    for (const std::int64_t block : sent.blocks) { offset += routes_.blocks[block].bytes; }
    for (const std::int64_t block : sent.gradients) {
      contributed_[block] = {block, sent.buffer, offset};
      layout_.steps[number - kStepsToSend].contributions.push_back(contributed_[block]);
      offset += gradient_bytes(setting_.problem, routes_.blocks[block].bytes);
    }
  }

  void add_sums() {
    for (const auto& [number, from] : came_) {
      const KvBlock& block = routes_.blocks[from.block];
      SumItem sum{from.block, from.buffer, from.offset_bytes, BufferId::own_gradient, 0, {}};
      if (block.owner == setting_.rank) {
        sum.to_rows = local_rows(setting_.shard, block.rows_global);
      } else {
        sum.to = contributed_[from.block].buffer;
        sum.to_offset_bytes = contributed_[from.block].offset_bytes;
      }
      layout_.steps[number].sums.push_back(std::move(sum));
    }
  }

  const Setting& setting_;
  const Routes& routes_;
  std::int64_t first_;
  Layout& layout_;
  std::vector<std::pair<std::int64_t, BlockPlace>> came_;  ///< dK and dV, and the step in which they come; by step
  List<BlockPlace> contributed_;                           ///< by block
};

/// An item comes one wave after the last before it that adds to the same rows of dQ, or of dK and dV: those of the same branch, heads and
/// segment with the same first query row, or first key row, and all of another branch. Then orders the items by wave.
void number_waves(std::vector<WorkItem>& work) {
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  std::map<Key, std::int64_t> next_of_queries;
  std::map<Key, std::int64_t> next_of_keys;
  std::map<std::int64_t, std::int64_t> next_of_branch;
  for (WorkItem& item : work) {
    const Key queries{item.branch, item.head_class, item.segment, item.heads.q_first, item.q_global.only().first};
    const Key keys{item.branch, item.head_class, item.segment, item.heads.q_first, item.k_global.only().first};
    item.wave = std::max(next_of_queries[queries], next_of_keys[keys]);
    for (const auto& [branch, next] : next_of_branch) {
      if (branch != item.branch) { item.wave = std::max(item.wave, next); }
    }
    next_of_queries[queries] = next_of_keys[keys] = item.wave + 1;
    std::int64_t& next = next_of_branch[item.branch];
    next = std::max(next, item.wave + 1);
  }
  std::stable_sort(work.begin(), work.end(), [](const WorkItem& a, const WorkItem& b) { return a.wave < b.wave; });
}

}  // namespace

void add_gradients(const Setting& setting, const Routes& routes, Layout& layout, std::int64_t first) {
  ANNULUS_ASSERT(std::ssize(layout.steps) <= first, "the forward pass has {} steps and the backward one begins with step {}",
                 layout.steps.size(), first);
  layout.steps.resize(static_cast<std::size_t>(first + 1));
  Builder builder(setting, routes, first, layout);
  builder.lay_out();

  // No order of keys is part of a gradient.
  const Routing routing{setting.routing.schedule, KeyOrder::arrival, 0, TileOrder::linear, true};
  const Setting as_it_comes{setting.problem, setting.pattern, setting.partition, routing, setting.rank, setting.shard, setting.classes};
  std::vector<Use> uses;
  for (const Hop& hop : routes.receives) { uses.push_back({first + hop.step, hop.block}); }
  add_items(as_it_comes, routes, first, uses, layout);
  const bool one_for_all = partials_of(setting) == 1;
  for (std::int64_t number = first; number < std::ssize(layout.steps); ++number) {
    std::vector<WorkItem>& work = layout.steps[number].work;
    for (WorkItem& item : work) {
      item.partial = one_for_all ? 0 : item.branch;
      if (item.keys.block < 0) {
        item.gradient = {-1, BufferId::own_gradient, gradient_bytes(setting.problem, item.keys.offset_bytes)};
      } else {
        const BlockPlace& place = builder.contributed(item.keys.block);
        item.gradient = {item.keys.block, place.buffer, place.offset_bytes};
      }
    }
    number_waves(work);
  }
}

}  // namespace annulus::planning
