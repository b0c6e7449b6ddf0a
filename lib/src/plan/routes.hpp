// SPDX-License-Identifier: Apache-2.0
// Which blocks a rank gets and gives on, from whom and to whom, in which step.
#pragma once

#include "setting.hpp"

#include <cstdint>
#include <vector>

namespace annulus::planning {

/// One hop of a block to or from this rank.
struct Hop {
  std::int64_t block = 0;  ///< index into Routes::blocks
  std::int64_t step = 0;
  std::int64_t peer = 0;
};

struct Routes {
  std::vector<KvBlock> blocks;
  std::vector<Hop> receives;  ///< by step, peer and block
  std::vector<Hop> sends;     ///< the same
};

/// Schedule ring: each block passes along the cyclic order of the ranks that need it.
Routes ring_routes(const Setting& setting);

/// Schedule ring-full: the undilated rows of every rank make ranks-1 hops.
Routes ring_full_routes(const Setting& setting);

/// The routes of a schedule.
Routes routes_of(const Setting& setting, Schedule schedule);

}  // namespace annulus::planning
