// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <span>

namespace annulus {

/// What a proof found.
struct Coverage {
  std::int64_t pairs = 0;           ///< visible (batch entry, branch, head, query, key), each attended exactly once
  std::int64_t gradient_pairs = 0;  ///< those that give to the gradients, each exactly once; 0 without gradients
  std::int64_t bytes_moved = 0;     ///< over all ranks
  std::int64_t steps = 0;           ///< of the longest plan
};

/// Runs the plans of all ranks symbolically (plans[i] is rank i's) and proves that
/// - what one rank sends is what its peer expects, block for block, and lies where the message says when it is sent;
/// - every visible (branch, head, query, key) is attended exactly once, judged token by token from the operator's definition;
/// - under KeyOrder::cyclic every query meets its keys in the order of one rank, unless its shard ends inside its block;
/// - every received block is used by its receiver (except under Schedule::ring_full);
/// - packs take the rows of their block, ops come in an order in which ranks that take turns never wait in vain, and work of one wave
///   touches disjoint rows of the partials;
/// - with gradients, every visible pair gives to them exactly once, and what each rank gives to dK and dV of a block comes home exactly
///   once;
/// - no memory is written while a message, a pack or work may still use it, and the buffers are no larger than needed.
/// Costs seq_len^2 * heads * branches; meant for small problems.
/// @throws AssertionFailure that says what is broken
Coverage prove_coverage(std::span<const RingPlan> plans);

}  // namespace annulus
