// SPDX-License-Identifier: Apache-2.0
#include "routes.hpp"

namespace annulus::planning {

Routes ring_full_routes(const Setting& setting) {
  Routes routes;
  const std::int64_t ranks = setting.partition.ranks();
  const std::int64_t left = (setting.rank + ranks - 1) % ranks;
  const std::int64_t right = (setting.rank + 1) % ranks;
  for (std::int64_t distance = 0; distance < ranks && ranks > 1; ++distance) {
    const std::int64_t owner = (setting.rank + ranks - distance) % ranks;
    for (const ShardPiece& piece : setting.partition.shard(owner).pieces) {
      const std::int64_t block =
          add_block(routes, setting.problem, {-1, -1, -1, owner, Rows<Global>(piece.global), range(0, setting.problem.kv_heads), 0});
      if (distance > 0) { routes.receives.push_back({block, distance, left}); }
      if (distance + 1 < ranks) { routes.sends.push_back({block, distance + 1, right}); }
      if (distance == 0) { routes.ends.push_back({block, ranks - 1, left}); }
    }
  }
  return routes;
}

}  // namespace annulus::planning
