// SPDX-License-Identifier: Apache-2.0
#include "instances.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace annulus::kernels::cuda {
namespace {

bool follows(std::int64_t outer, std::int64_t inner, std::int64_t inner_count) { return outer == inner * inner_count; }

}  // namespace

std::int64_t instances_of(const AttendTask& task) { return task.batch * task.segments * task.kv_heads * task.q_per_kv; }

InstanceMap instances_over(const AttendTask& task) {
  std::vector<InstanceAxis> axes;
  const auto add = [&](std::int64_t count, std::int64_t TaskStrides::* stride, bool of_kv) {
    if (count == 1) { return; }
    axes.push_back(
        {count, {task.q_strides.*stride, of_kv ? task.kv_strides.*stride : 0, task.acc_strides.*stride, task.stat_strides.*stride}});
  };
  add(task.batch, &TaskStrides::batch, true);
  add(task.segments, &TaskStrides::segment, true);
  add(task.kv_heads, &TaskStrides::kv_head, true);
  add(task.q_per_kv, &TaskStrides::head, false);

  const auto joins = [](const InstanceAxis& outer, const InstanceAxis& inner) {
    return follows(outer.stride.q, inner.stride.q, inner.count) && follows(outer.stride.kv, inner.stride.kv, inner.count) &&
           follows(outer.stride.acc, inner.stride.acc, inner.count) && follows(outer.stride.stat, inner.stride.stat, inner.count);
  };
  for (bool joined = true; joined;) {
    joined = false;
    for (std::size_t i = 0; i < axes.size() && !joined; ++i) {
      for (std::size_t j = 0; j < axes.size() && !joined; ++j) {
        if (i == j || !joins(axes[i], axes[j])) { continue; }
        axes[j].count *= axes[i].count;
        axes.erase(axes.begin() + static_cast<std::ptrdiff_t>(i));
        joined = true;
      }
    }
  }
  if (axes.empty()) { axes.push_back({}); }
  std::stable_sort(axes.begin(), axes.end(), [](const InstanceAxis& a, const InstanceAxis& b) { return a.count < b.count; });

  InstanceMap map;
  map.axes = static_cast<int>(axes.size());
  std::copy(axes.begin(), axes.end(), map.axis);
  return map;
}

}  // namespace annulus::kernels::cuda
