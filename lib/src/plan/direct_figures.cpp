// SPDX-License-Identifier: Apache-2.0
#include "direct_figures.hpp"

#include "layout.hpp"

#include <algorithm>
#include <optional>
#include <span>
#include <utility>

namespace annulus::planning {

namespace {

/// Calls visit(flows) for the flows of each peer.
template <class Flow, class Visit>
void for_each_peer(std::span<const Flow> flows, Visit&& visit) {
  for (std::size_t begin = 0, end = 0; begin < flows.size(); begin = end) {
    while (end < flows.size() && flows[end].peer == flows[begin].peer) { ++end; }
    visit(flows.subspan(begin, end - begin));
  }
}

}  // namespace

const Walk& DirectFigures::walk_over(const Setting& setting, const Key& key) {
  const auto found = walks_.find(key);
  if (found != walks_.end()) { return found->second; }
  const auto [branch, head_class, segment] = key;
  return walks_.emplace(key, Walk(setting, branch, segment, setting.rows_of(branch, head_class, segment))).first->second;
}

void DirectFigures::collect(const Setting& setting, const Key& key) {
  const Walk& walk = walk_over(setting, key);
  const Walk::Member* const self = walk.member(setting.rank);
  if (self == nullptr) { return; }
  const Problem& problem = setting.problem;
  const std::int64_t kv_heads = setting.heads(std::get<0>(key), std::get<1>(key)).kv.count;
  const std::int64_t row_bytes = block_bytes(problem, 1, kv_heads);
  const bool gathers = setting.routing.schedule == Schedule::allgather;
  const auto step_of = [&](const Walk::Member& member, std::int64_t number) { return gathers ? 1 : walk.step(member, number); };

  const bool apart = problem.causal && self->lower >= 0;
  if (apart && setting.routing.key_order == KeyOrder::cyclic) {
    last_step_ = std::max(last_step_, gathers ? 1 : self->upper - self->lower);
  }
  for (std::int64_t number = 0; number < walk.parts(); ++number) {
    if (!walk.needs(*self, number)) { continue; }
    const std::int64_t step = step_of(*self, number);
    const std::int64_t last_use = step + (apart && number < self->lower && !gathers ? 1 : 0);
    receives_.push_back({step, walk.part(number).rank, walk.part(number).rows.count() * row_bytes, -1, last_use});
    last_step_ = std::max(last_step_, last_use);
  }
  for (const std::int64_t number : {self->lower, self->upper}) {
    if (number < 0) { continue; }
    const Rows<Global>& rows = walk.part(number).rows;
    const std::int64_t place = place_in_resident(setting, rows, kv_heads).value_or(-1);
    for (const Walk::Member& member : walk.members()) {
      if (!walk.needs(member, number)) { continue; }
      sends_.push_back({step_of(member, number), member.rank, rows.count() * row_bytes, place, 0});
      last_step_ = std::max(last_step_, sends_.back().step);
    }
  }
}

void DirectFigures::collect_extra_keys(const Setting& setting) {
  constexpr std::int64_t kElsewhere = std::int64_t{1} << 61;  // no resident rows come before or after them
  const std::int64_t bytes = block_bytes(setting.problem, setting.problem.extra_keys, setting.problem.kv_heads);
  if (takes_extra_keys(setting)) {
    receives_.push_back({1, kExtraOwner, bytes, -1, 1});
    last_step_ = std::max<std::int64_t>(last_step_, 1);
  }
  for_each_taker(setting, [&](std::int64_t rank) {
    sends_.push_back({1, rank, bytes, kElsewhere, 0});
    last_step_ = std::max<std::int64_t>(last_step_, 1);
  });
}

template <class Visit>
void DirectFigures::for_each_step(std::vector<Flow>& flows, Visit&& visit) {
  // By step they are sorted by counting; by peer, the few of one step come nearly in order.
  std::vector<std::size_t> ends(static_cast<std::size_t>(last_step_) + 2, 0);
  for (const Flow& flow : flows) { ++ends[static_cast<std::size_t>(flow.step) + 1]; }
  for (std::size_t step = 1; step < ends.size(); ++step) { ends[step] += ends[step - 1]; }
  std::vector<Flow> sorted(flows.size());
  for (const Flow& flow : flows) { sorted[ends[static_cast<std::size_t>(flow.step)]++] = flow; }
  flows.swap(sorted);
  for (std::size_t begin = 0, end = 0; begin < flows.size(); begin = end) {
    while (end < flows.size() && flows[end].step == flows[begin].step) { ++end; }
    const std::span<Flow> of_step = std::span(flows).subspan(begin, end - begin);
    const auto by_peer = [](const Flow& a, const Flow& b) { return a.peer < b.peer; };
    if (!std::is_sorted(of_step.begin(), of_step.end(), by_peer)) { std::stable_sort(of_step.begin(), of_step.end(), by_peer); }
    visit(std::span<const Flow>(of_step));
  }
}

LinkBytes& DirectFigures::link(std::int64_t peer) { return links_[static_cast<std::size_t>(peer)]; }

void DirectFigures::add(const Setting& setting, PlanFigures& figures) {
  receives_.clear();
  sends_.clear();
  last_step_ = 0;
  links_.assign(static_cast<std::size_t>(setting.partition.ranks()), {});
  for_each_cut_segment(setting, [&](std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
    collect(setting, {branch, head_class, segment});
  });
  collect_extra_keys(setting);

  SlotChooser slots(steps_ahead(setting.routing.schedule));
  for_each_step(receives_, [&](std::span<const Flow> flows) {
    std::int64_t last_use = 0;
    for (const Flow& flow : flows) { last_use = std::max(last_use, flow.last_use); }
    std::int64_t& slot = figures.sizes.slot_bytes[slots.take(flows.front().step, last_use)];
    std::int64_t end = 0;
    for_each_peer(flows, [&](std::span<const Flow> message) {
      const std::int64_t begin = aligned(end);
      std::int64_t bytes = 0;
      for (const Flow& flow : message) {
        bytes += flow.bytes;
        require_message(bytes, begin, setting.rank, flow.peer);
      }
      end = begin + bytes;
      figures.cost.bytes_received += bytes;
      link(message.front().peer).received += bytes;
    });
    slot = std::max(slot, end);
  });
  for_each_step(sends_, [&](std::span<const Flow> flows) {
    std::int64_t packed = 0;
    for_each_peer(flows, [&](std::span<const Flow> message) {
      std::int64_t bytes = 0;
      bool in_place = true;
      for (const Flow& flow : message) {
        in_place = in_place && flow.place >= 0 && flow.place == message.front().place + bytes;
        bytes += flow.bytes;
        require_message(bytes, 0, setting.rank, flow.peer);
      }
      figures.cost.bytes_sent += bytes;
      ++figures.cost.messages_sent;
      link(message.front().peer).sent += bytes;
      if (in_place) { return; }
      const std::int64_t begin = aligned(packed);
      require_message(bytes, begin, setting.rank, message.front().peer);
      packed = begin + bytes;
    });
    std::int64_t& size = figures.sizes.send_bytes[static_cast<std::size_t>(flows.front().step % 2)];
    size = std::max(size, packed);
  });
  figures.cost.steps = last_step_ + 1;
  for (std::int64_t peer = 0; peer < std::ssize(links_); ++peer) {
    if (link(peer).sent == 0 && link(peer).received == 0) { continue; }
    link(peer).peer = peer;
    figures.cost.links.push_back(link(peer));
  }
}

}  // namespace annulus::planning
