// SPDX-License-Identifier: Apache-2.0
// What the proofs about plans share, and the one about where dK and dV go.
#pragma once

#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <span>

namespace annulus::planning {

/// What identifies a block to all ranks.
struct BlockKey {
  std::int64_t branch, head_class, segment, owner;
  Rows<Global> rows;
  Progression kv_heads;
  std::int64_t bytes;
  bool operator==(const BlockKey&) const = default;
};
BlockKey key_of(const KvBlock& block);

/// The global row that a rank keeps as its local row, through whichever piece of its shard holds that; -1 if none does.
std::int64_t global_row(const Shard& shard, std::int64_t local);

/// An empty step where the plan has fewer.
const Step& step_or_empty(const RingPlan& plan, std::int64_t number);

/// Runs the ranks' backward passes in turns and follows which ranks' contributions are in which dK and dV: every rank that meets a block of
/// another must be in what comes home to the block's owner, once. plans[i] is rank i's; messages and memory are proved elsewhere.
/// @throws AssertionFailure that says what is broken
void prove_gradient_flow(std::span<const RingPlan> plans);

}  // namespace annulus::planning
