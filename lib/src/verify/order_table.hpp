// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// The checker's own account of an order of the sequence: the row at each position. Made by going through the whole curve or all numbers;
/// shares nothing with Permutation, which counts. 8 bytes for each token.
std::vector<std::int64_t> order_table(SequenceOrder order, std::int64_t seq_len);

/// The same, turned round: the position of each row.
std::vector<std::int64_t> position_table(SequenceOrder order, std::int64_t seq_len);

}  // namespace annulus
