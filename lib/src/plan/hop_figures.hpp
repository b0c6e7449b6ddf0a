// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/plan/cost.hpp>

#include "routes/routes.hpp"
#include "routes/walk.hpp"

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

namespace annulus::planning {

/// What passes the ranks under schedules direct, allgather and ring, for any partition, counted without blocks, messages or work. All ranks
/// share the walks over a segment, or its ring; for each of them it looks at every part of every other once.
class HopFigures {
 public:
  /// Adds to `figures` the slots, send buffers, steps, messages and bytes of the setting's rank. Ranks ascend from call to call.
  void add(const Setting& setting, PlanFigures& figures);

 private:
  /// A block that comes or goes.
  struct Flow {
    std::int64_t step = 0;
    std::int64_t peer = 0;
    std::int64_t bytes = 0;
    std::int64_t place = -1;  ///< of a block that goes: where it lies as it goes, in the resident K and V; -1 if it does not
    std::int64_t last_use = 0;
    std::int64_t came = -1;  ///< of a block that comes and may go on: its number among those
  };
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t>;  // branch, head class, segment

  const Walk& walk_over(const Setting& setting, const Key& key);
  /// Of schedules direct and allgather.
  void collect_walk(const Setting& setting, const Key& key);
  const std::vector<Member>& ring_of(const Setting& setting, const Key& key);
  /// Of schedule ring.
  void collect_ring(const Setting& setting, const Key& key);
  void collect_extra_keys(const Setting& setting);
  /// Calls visit(flows of one step, by peer) for each step in which something flows, ascending.
  template <class Visit>
  void for_each_step(std::vector<Flow>& flows, Visit&& visit);
  LinkBytes& link(std::int64_t peer);

  std::map<Key, Walk> walks_;
  std::map<Key, std::vector<Member>> rings_;
  std::vector<Flow> receives_;
  std::vector<Flow> sends_;
  std::vector<std::int64_t> places_;  ///< by Flow::came
  std::int64_t last_step_ = 0;        ///< in which something is met or moved
  std::vector<LinkBytes> links_;
};

}  // namespace annulus::planning
