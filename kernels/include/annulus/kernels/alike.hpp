// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

namespace annulus::kernels {

/// Whether two tasks are cut into the same tiles.
inline bool tiled_alike(const AttendTask& a, const AttendTask& b) {
  return a.head_dim == b.head_dim && a.dtype == b.dtype && a.mask == b.mask;
}

/// Calls `attend(tasks)` for each group of tasks that are tiled alike, until every task has been in one: whatever mask or dtype it has,
/// none is left over. Neighbours of one head_dim and dtype are regrouped by mask, the last of the enumeration (causal) first; within a
/// group the order is that of the list. `storage` holds the groups of a mixed list and must stay until attend() is done with them.
template <class Attend>
void for_each_alike(std::span<const AttendTask> tasks, std::vector<AttendTask>& storage, Attend&& attend) {
  while (!tasks.empty()) {
    const AttendTask& front = tasks.front();
    const auto differs = [&](const AttendTask& task) { return task.head_dim != front.head_dim || task.dtype != front.dtype; };
    const auto count = static_cast<std::size_t>(std::find_if(tasks.begin(), tasks.end(), differs) - tasks.begin());
    std::span<const AttendTask> group = tasks.first(count);
    tasks = tasks.subspan(count);
    if (!std::all_of(group.begin(), group.end(), [&](const AttendTask& task) { return tiled_alike(task, front); })) {
      storage.assign(group.begin(), group.end());
      std::stable_sort(storage.begin(), storage.end(), [](const AttendTask& a, const AttendTask& b) { return a.mask > b.mask; });
      group = storage;
    }
    while (!group.empty()) {
      const auto end = std::find_if(group.begin(), group.end(), [&](const AttendTask& task) { return !tiled_alike(task, group.front()); });
      const auto alike = static_cast<std::size_t>(end - group.begin());
      attend(group.first(alike));
      group = group.subspan(alike);
    }
  }
}

}  // namespace annulus::kernels
