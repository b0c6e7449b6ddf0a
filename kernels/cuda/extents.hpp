// SPDX-License-Identifier: Apache-2.0
// Arithmetic of extents, on the host alone.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace annulus::kernels::cuda {

inline std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }
inline std::int64_t ceil_div(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

/// `value` as int for grids and BLAS.
inline int to_int(std::int64_t value) {
  if (value < 0 || value > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("extent or stride " + std::to_string(value) + " does not fit an int");
  }
  return static_cast<int>(value);
}

/// @throws std::invalid_argument with `message` unless `condition`
inline void require(bool condition, const char* message) {
  if (!condition) { throw std::invalid_argument(message); }
}

}  // namespace annulus::kernels::cuda
