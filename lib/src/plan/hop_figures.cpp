// SPDX-License-Identifier: Apache-2.0
#include "hop_figures.hpp"

#include "layout.hpp"

#include <algorithm>
#include <optional>
#include <span>
#include <utility>

namespace annulus::planning {

namespace {

/// Where what was received begins among the places of blocks, behind resident rows; extra keys lie next to neither.
constexpr std::int64_t kInSlot = std::int64_t{1} << 60;
constexpr std::int64_t kExtra = std::int64_t{1} << 61;

/// Calls visit(flows) for the flows of each peer.
template <class Flow, class Visit>
void for_each_peer(std::span<const Flow> flows, Visit&& visit) {
  for (std::size_t begin = 0, end = 0; begin < flows.size(); begin = end) {
    while (end < flows.size() && flows[end].peer == flows[begin].peer) { ++end; }
    visit(flows.subspan(begin, end - begin));
  }
}

}  // namespace

const Walk& HopFigures::walk_over(const Setting& setting, const Key& key) {
  const auto found = walks_.find(key);
  if (found != walks_.end()) { return found->second; }
  const auto [branch, head_class, segment] = key;
  return walks_.emplace(key, Walk(setting, branch, segment, setting.rows_of(branch, head_class, segment))).first->second;
}

const std::vector<Member>& HopFigures::ring_of(const Setting& setting, const Key& key) {
  const auto found = rings_.find(key);
  if (found != rings_.end()) { return found->second; }
  const auto [branch, head_class, segment] = key;
  return rings_.emplace(key, members_of(setting, branch, segment, setting.rows_of(branch, head_class, segment))).first->second;
}

void HopFigures::collect_ring(const Setting& setting, const Key& key) {
  const std::vector<Member>& members = ring_of(setting, key);
  const auto self =
      std::lower_bound(members.begin(), members.end(), setting.rank, [](const Member& a, std::int64_t b) { return a.rank < b; });
  if (self == members.end() || self->rank != setting.rank) { return; }
  const std::int64_t kv_heads = setting.heads(std::get<0>(key), std::get<1>(key)).kv.count;
  const std::int64_t row_bytes = block_bytes(setting.problem, 1, kv_heads);
  const std::int64_t size = std::ssize(members);
  const std::int64_t self_index = self - members.begin();
  for (std::int64_t owner = 0; owner < size; ++owner) {
    const auto at = [&](std::int64_t distance) -> const Member& { return members[static_cast<std::size_t>((owner + distance) % size)]; };
    const std::int64_t distance = (self_index - owner + size) % size;
    for (const Rows<Global>& owned : members[static_cast<std::size_t>(owner)].owned) {
      const auto needs = [&](std::int64_t far) {
        return far >= 1 && far < size && (!setting.problem.causal || at(far).last_row >= owned[0]);
      };
      const std::int64_t bytes = owned.count() * row_bytes;
      if (distance > 0) {
        if (!needs(distance)) { continue; }
        const auto came = std::ssize(places_);
        places_.push_back(-1);
        receives_.push_back({distance, at(needs(distance - 1) ? distance - 1 : 0).rank, bytes, -1, distance, came});
        last_step_ = std::max(last_step_, distance);
        if (!needs(distance + 1)) { continue; }
        sends_.push_back({distance + 1, at(distance + 1).rank, bytes, -1, 0, came});
        last_step_ = std::max(last_step_, distance + 1);
        continue;
      }
      const std::int64_t place = place_in_resident(setting, owned, kv_heads).value_or(-1);
      for (std::int64_t far = 1; far < size; ++far) {
        if (!needs(far) || needs(far - 1)) { continue; }
        sends_.push_back({far, at(far).rank, bytes, place, 0});
        last_step_ = std::max(last_step_, far);
      }
    }
  }
}

void HopFigures::collect_walk(const Setting& setting, const Key& key) {
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

void HopFigures::collect_extra_keys(const Setting& setting) {
  const std::int64_t bytes = block_bytes(setting.problem, setting.problem.extra_keys, setting.problem.kv_heads);
  if (takes_extra_keys(setting)) {
    receives_.push_back({1, kExtraOwner, bytes, -1, 1});
    last_step_ = std::max<std::int64_t>(last_step_, 1);
  }
  for_each_taker(setting, [&](std::int64_t rank) {
    sends_.push_back({1, rank, bytes, kExtra, 0});
    last_step_ = std::max<std::int64_t>(last_step_, 1);
  });
}

template <class Visit>
void HopFigures::for_each_step(std::vector<Flow>& flows, Visit&& visit) {
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

LinkBytes& HopFigures::link(std::int64_t peer) { return links_[static_cast<std::size_t>(peer)]; }

void HopFigures::add(const Setting& setting, PlanFigures& figures) {
  receives_.clear();
  sends_.clear();
  places_.clear();
  last_step_ = 0;
  links_.assign(static_cast<std::size_t>(setting.partition.ranks()), {});
  for_each_cut_segment(setting, [&](std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
    const Key key{branch, head_class, segment};
    setting.routing.schedule == Schedule::ring ? collect_ring(setting, key) : collect_walk(setting, key);
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
        if (flow.came >= 0) { places_[static_cast<std::size_t>(flow.came)] = kInSlot + begin + bytes; }
        bytes += flow.bytes;
        require_message(bytes, begin, setting.rank, flow.peer);
      }
      end = begin + bytes;
      figures.cost.bytes_received += bytes;
      link(message.front().peer).received += bytes;
    });
    slot = std::max(slot, end);
  });
  for (Flow& flow : sends_) {
    if (flow.came >= 0) { flow.place = places_[static_cast<std::size_t>(flow.came)]; }
  }
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
