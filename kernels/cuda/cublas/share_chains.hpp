// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tiling.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus::kernels::cuda {

/// Enqueues all chains, each on one lane, tile after tile; the lane with least work takes the next tile, so that lanes fill together and
/// end together. `has_tiles(chain)` says whether a tile of the chain is left, and `enqueue(chain, lane)` enqueues the next one and returns
/// what it costs. At most kMostStreams lanes.
template <class Chain, class HasTiles, class Enqueue>
void share_chains(std::vector<Chain>& chains, std::size_t lanes, const HasTiles& has_tiles, const Enqueue& enqueue) {
  std::array<std::int64_t, kMostStreams> cost{};
  std::array<Chain*, kMostStreams> current{};
  std::size_t next = 0;
  for (;;) {
    std::size_t least = lanes;
    for (std::size_t i = 0; i < lanes; ++i) {
      if (current[i] == nullptr && next == chains.size()) { continue; }
      if (least == lanes || cost[i] < cost[least]) { least = i; }
    }
    if (least == lanes) { return; }
    if (current[least] == nullptr) { current[least] = &chains[next++]; }
    Chain& chain = *current[least];
    if (has_tiles(chain)) { cost[least] += enqueue(chain, least); }
    if (!has_tiles(chain)) { current[least] = nullptr; }
  }
}

}  // namespace annulus::kernels::cuda
