// SPDX-License-Identifier: Apache-2.0
// Counting visible pairs in closed form.
#pragma once

#include <annulus/pattern/progression.hpp>

#include <cstdint>

namespace annulus::planning {

/// sum over 0 <= i < n of floor((a*i + b) / m), for a, b >= 0 and m >= 1, in O(log m): the Euclid-like lattice point count.
Int128 floor_sum(std::int64_t n, std::int64_t m, std::int64_t a, std::int64_t b);

/// Pairs of one segment and head under the causal mask: for each query, the keys at or before it.
Int128 causal_pairs(const Progression& q, const Progression& k);

}  // namespace annulus::planning
