// SPDX-License-Identifier: Apache-2.0
// Where the instances of a task lie, on the host alone.
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <cstdint>

namespace annulus::kernels::cuda {

/// Offsets of an instance (one query head of one batch entry and segment) in the operands of a task, in elements.
struct InstanceOffsets {
  std::int64_t q = 0;
  std::int64_t kv = 0;
  std::int64_t acc = 0;
  std::int64_t stat = 0;
};

inline InstanceOffsets operator+(const InstanceOffsets& a, const InstanceOffsets& b) {
  return {a.q + b.q, a.kv + b.kv, a.acc + b.acc, a.stat + b.stat};
}
inline InstanceOffsets operator*(std::int64_t factor, const InstanceOffsets& a) {
  return {factor * a.q, factor * a.kv, factor * a.acc, factor * a.stat};
}

/// An axis over which instances repeat, and the offsets from one to the next.
struct InstanceAxis {
  std::int64_t count = 1;
  InstanceOffsets stride;
};

/// The instances of a tile: consecutive ones, from `first` on, of the product of the axes (the last one fastest).
struct InstanceMap {
  InstanceAxis axis[4];
  int axes = 0;
  int first = 0;
};

std::int64_t instances_of(const AttendTask& task);

/// The instances of a task over as few axes as its strides allow, the longest last.
InstanceMap instances_over(const AttendTask& task);

}  // namespace annulus::kernels::cuda
