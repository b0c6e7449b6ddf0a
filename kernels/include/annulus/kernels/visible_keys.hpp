// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <algorithm>
#include <cstdint>

namespace annulus::kernels {

/// Keys of the task that query row `row` sees: always the first ones, because positions ascend. Segments shift queries and keys alike.
inline std::int64_t visible_keys(const AttendTask& task, std::int64_t row) {
  switch (task.mask) {
    case Mask::none:
      return task.k_rows;
    case Mask::causal:
      break;
  }
  const std::int64_t ahead = task.q_positions.first + row * task.q_positions.stride - task.k_positions.first;
  return ahead < 0 ? 0 : std::min(task.k_rows, ahead / task.k_positions.stride + 1);
}

/// The keys of a task that lie from the own block of query row `row` down: always the first ones. The others lie above it.
inline std::int64_t keys_down(const AttendTask& task, std::int64_t row) {
  const std::int64_t block = (task.place.q_first + row) / task.place.block_rows;
  return std::clamp<std::int64_t>((block + 1) * task.place.block_rows - task.place.k_first, 0, task.k_rows);
}

}  // namespace annulus::kernels
