// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <cstdint>

namespace annulus::kernels {

/// As ZeroKeysTask says, on host memory. @tparam Number  of max and sum
template <class Number>
void add_zero_keys_as(const ZeroKeysTask& task) {
  auto* const max = static_cast<Number*>(task.max);
  auto* const sum = static_cast<Number*>(task.sum);
  for (std::int64_t b = 0; b < task.batch; ++b) {
    for (std::int64_t s = 0; s < task.segments; ++s) {
      for (std::int64_t j = 0; j < task.kv_heads; ++j) {
        for (std::int64_t i = 0; i < task.q_per_kv; ++i) {
          const std::int64_t first = b * task.strides.batch + s * task.strides.segment + j * task.strides.kv_head + i * task.strides.head;
          for (std::int64_t row = 0; row < task.rows; ++row) {
            max[first + row * task.strides.row] = 0;
            sum[first + row * task.strides.row] += static_cast<Number>(task.count);
          }
        }
      }
    }
  }
}

}  // namespace annulus::kernels
