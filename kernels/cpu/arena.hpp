// SPDX-License-Identifier: Apache-2.0
// What the kernels that work on tiles share: their workspace, and where the operands of a task begin.
#pragma once

#include <annulus/kernels/tasks.hpp>

#include "tile_ops.hpp"

#include <cstddef>
#include <cstdint>

namespace annulus::kernels::cpu {

inline constexpr std::int64_t kArenaAlignment = 64;

/// Hands out 64-byte aligned pieces of a thread's workspace, or only counts them when base is null.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}
  template <class Number>
  Number* take(std::int64_t count) {
    auto* piece = base_ == nullptr ? nullptr : reinterpret_cast<Number*>(base_ + used_);
    used_ += round_up(count * static_cast<std::int64_t>(sizeof(Number)), kArenaAlignment);
    return piece;
  }
  std::int64_t used() const { return used_; }

 private:
  std::byte* base_;
  std::int64_t used_ = 0;
};

/// What a group of a task, one (batch, segment, kv_head), is.
struct GroupPlace {
  std::int64_t batch = 0;
  std::int64_t segment = 0;
  std::int64_t kv_head = 0;
};
inline GroupPlace group_place(const AttendTask& task, std::int64_t group) {
  return {group / task.kv_heads / task.segments, group / task.kv_heads % task.segments, group % task.kv_heads};
}

/// Base of the operand's element for a (batch, segment, kv_head).
inline std::int64_t group_offset(const AttendTask& task, const TaskStrides& strides, std::int64_t group) {
  const GroupPlace at = group_place(task, group);
  return at.batch * strides.batch + at.segment * strides.segment + at.kv_head * strides.kv_head;
}

}  // namespace annulus::kernels::cpu
