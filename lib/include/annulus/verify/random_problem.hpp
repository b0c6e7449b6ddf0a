// SPDX-License-Identifier: Apache-2.0
// Random problems of the property test `annulus check --cases`.
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/core/grid.hpp>
#include <annulus/core/problem.hpp>

#include <cstdint>
#include <optional>
#include <string>

namespace annulus {

/// A problem, how it is spread, and the seed of its data.
struct RandomCase {
  Problem problem;
  Pattern pattern;
  PartitionKind partition = PartitionKind::contiguous;
  Schedule schedule = Schedule::ring;
  std::int64_t ranks = 1;
  Grid grid;
  TileOrder tile_order = TileOrder::linear;
  std::uint64_t data_seed = 0;  ///< below 2^32, so that every configuration format can hold it

  /// One line for reports.
  std::string describe() const;
  /// The flags that make one process run this case, on virtual ranks. Under a launcher of `ranks` processes leave out --virtual-ranks.
  std::string flags() const;
};

/// Case `number` of the stream `seed`: equal arguments give equal cases on every machine. Cases are small (a fraction of a second on one
/// core) and crowd where mistakes live: shards of one row or none, segments that miss shard boundaries, rates that divide nothing, spare
/// heads.
/// @param fixed_ranks  number of ranks where the caller cannot choose it; otherwise 1 to 16
/// @param kernel       dtype and head dim are some that it takes
/// @throws InvalidArgument if `number` is negative or `fixed_ranks` is below 1
RandomCase random_case(std::uint64_t seed, std::int64_t number, std::optional<std::int64_t> fixed_ranks,
                       KernelKind kernel = KernelKind::automatic);

}  // namespace annulus
