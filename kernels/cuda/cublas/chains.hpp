// SPDX-License-Identifier: Apache-2.0
// How tasks are cut into tiles, on the host alone.
#pragma once

#include <annulus/kernels/cublas.hpp>
#include <annulus/kernels/tasks.hpp>

#include "instances.hpp"

#include <cstdint>
#include <vector>

namespace annulus::kernels::cuda {

/// @throws std::invalid_argument if an extent is out of range
void validate(const AttendTask& task);

/// Query rows [q_begin, q_end) of some instances of a task, with all keys they see, tile after tile on one lane.
struct Chain {
  const AttendTask* task = nullptr;
  InstanceMap map;          ///< of the chain's instances; `base` already added when they lie on one axis
  InstanceOffsets base;     ///< of instance 0 of the map
  bool by_pointer = false;  ///< instances lie on several axes: the products take arrays of pointers
  std::int64_t instances = 0;
  std::int64_t q_begin = 0;
  std::int64_t q_end = 0;
  std::int64_t k_next = 0;
  std::int64_t k_end = 0;
  std::int64_t k_step = 0;
};

/// Cuts a task into chains, which keep its address. Together they meet every (query, key) that see each other once, the keys of a query in
/// ascending order.
void append_chains(const AttendTask& task, const CublasTiling& tiling, std::vector<Chain>& chains);

/// Query rows [q_begin, q_begin + rows) by keys [k_begin, k_begin + cols) of all instances of a chain.
struct KeyTile {
  std::int64_t q_begin = 0;
  std::int64_t rows = 0;  ///< 0: no query sees one of the keys
  std::int64_t k_begin = 0;
  std::int64_t cols = 0;
  bool masked = false;  ///< some key of the tile is hidden from some row
};

/// Takes the next tile off a chain that is not at its end: k_next < k_end. Rows that see none of its keys are left out.
KeyTile take_tile(Chain& chain);

/// Whether two tasks certainly share no row of acc. Proved by looking at addresses modulo the common divisor of all strides but those of
/// the heads: tasks of different heads, or of the same heads at different offsets of a dilation, differ there.
bool disjoint(const AttendTask& a, const AttendTask& b);

}  // namespace annulus::kernels::cuda
