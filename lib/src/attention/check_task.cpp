// SPDX-License-Identifier: Apache-2.0
#include "check_task.hpp"

#include <annulus/core/error.hpp>
#include <annulus/core/problem.hpp>

namespace annulus {
namespace {

void check_partial(const kernels::PartialPointers& partial, const char* operation) {
  ANNULUS_EXPECTS(partial.acc != nullptr && partial.max != nullptr && partial.sum != nullptr, "{}: a partial has a null pointer",
                  operation);
}

}  // namespace

void check_task(const kernels::ZeroKeysTask& task) {
  ANNULUS_EXPECTS(task.count >= 1 && task.batch >= 1 && task.segments >= 1 && task.rows >= 1 && task.kv_heads >= 1 && task.q_per_kv >= 1,
                  "add_zero_keys: extents must be at least 1, found count {} batch {} segments {} rows {} kv_heads {} q_per_kv {}",
                  task.count, task.batch, task.segments, task.rows, task.kv_heads, task.q_per_kv);
  ANNULUS_EXPECTS(task.max != nullptr && task.sum != nullptr, "add_zero_keys: null pointer");
}

void check_task(const kernels::AttendTask& task) {
  ANNULUS_EXPECTS(task.batch >= 1 && task.segments >= 1 && task.q_rows >= 1 && task.k_rows >= 1 && task.kv_heads >= 1 && task.q_per_kv >= 1,
                  "attend: extents must be at least 1, found batch {} segments {} q_rows {} k_rows {} kv_heads {} q_per_kv {}", task.batch,
                  task.segments, task.q_rows, task.k_rows, task.kv_heads, task.q_per_kv);
  ANNULUS_EXPECTS(task.head_dim >= 1 && task.head_dim <= kMaxHeadDim, "attend: head_dim {} is not in 1..{}", task.head_dim, kMaxHeadDim);
  ANNULUS_EXPECTS(task.q_positions.stride >= 1 && task.k_positions.stride >= 1,
                  "attend: position strides must be at least 1, found {} and {}", task.q_positions.stride, task.k_positions.stride);
  ANNULUS_EXPECTS(task.q != nullptr && task.k != nullptr && task.v != nullptr, "attend: null pointer");
  check_partial({task.acc, task.max, task.sum}, "attend");
}

void check_task(const kernels::FinishTask& task) {
  ANNULUS_EXPECTS(task.batch >= 1 && task.rows >= 1 && task.heads >= 1 && task.head_dim >= 1,
                  "finish: extents must be at least 1, found batch {} rows {} heads {} head_dim {}", task.batch, task.rows, task.heads,
                  task.head_dim);
  ANNULUS_EXPECTS(task.partials >= 1 && task.partials <= kernels::kMaxPartials, "finish: {} partials are not in 1..{}", task.partials,
                  kernels::kMaxPartials);
  ANNULUS_EXPECTS(task.out != nullptr && task.lse != nullptr, "finish: null pointer");
  for (int g = 0; g < task.partials; ++g) { check_partial(task.partial[g], "finish"); }
}

void check_task(const kernels::BeginGradientsTask& task) {
  check_task(task.forward);
  ANNULUS_EXPECTS(task.dout != nullptr, "begin_gradients: null pointer");
}

void check_task(const kernels::GradientTask& task) {
  check_task(task.attend);
  ANNULUS_EXPECTS(task.dout != nullptr && task.dk != nullptr && task.dv != nullptr, "differentiate: null pointer");
  ANNULUS_EXPECTS(task.attend.place == kernels::SegmentPlace{}, "differentiate: a task keeps an order of keys");
}

}  // namespace annulus
