// SPDX-License-Identifier: Apache-2.0
// What a plan costs: counts, never times. Counts over rows times keys, branches or steps may pass 2^63 long before the tensors do.
#pragma once

#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace annulus {

/// Visible (query, key) pairs of a work item, over all its batch entries, segments and query heads.
Int128 visible_pairs(const Problem& problem, const WorkItem& item);

/// Traffic of one rank with one peer.
struct LinkBytes {
  std::int64_t peer = 0;
  Int128 sent = 0;
  Int128 received = 0;
  bool operator==(const LinkBytes&) const = default;
};

struct PlanCost {
  Int128 pairs = 0;           ///< visible (query, key) pairs, all heads and batch entries
  Int128 gradient_pairs = 0;  ///< of them, those that the backward pass differentiates: all or none
  double flops = 0;           ///< 4 * head_dim * pairs, and 10 * head_dim * gradient_pairs
  Int128 bytes_sent = 0;
  Int128 bytes_received = 0;
  std::int64_t messages_sent = 0;
  std::int64_t steps = 0;
  std::vector<LinkBytes> links;  ///< by peer, ascending
  bool operator==(const PlanCost&) const = default;
};

PlanCost plan_cost(const RingPlan& plan);

/// Of the cost's FLOPs, those of the backward pass: 10 * head_dim * gradient_pairs.
double gradient_flops(const Problem& problem, const PlanCost& cost);

/// Bytes of the plan's partials for kernels that keep each for the whole shard, numbers of `accumulator_bytes` bytes: 4, or 8 for
/// reference.
Int128 whole_partials_bytes(const Problem& problem, const PlanSizes& sizes, std::int64_t accumulator_bytes);

/// Memory of the rank, with what its kernel takes for partials.
/// @throws InvalidArgument if it is beyond 2^62 bytes
MemoryPlan plan_memory(const Problem& problem, const PlanSizes& sizes, Int128 partials);

PlanSizes sizes_of(const RingPlan& plan);

/// Visible (batch, query head, query, key) of the queries of each rank, in all branches.
/// @throws InvalidArgument as make_plan
std::vector<Int128> pairs_of_ranks(const Problem& problem, const Pattern& pattern, const Partition& partition);

/// Under schedule direct: what the busiest sender of each step sends, over all steps, in units of what a rank sends on average. 1 if in
/// every step all send alike; under a causal mask many ranks want one rank's rows at once.
/// @throws InvalidArgument as make_plan
double busiest_sender_share(const Problem& problem, const Pattern& pattern, const Partition& partition);

/// What the plan of one rank comes to.
struct PlanFigures {
  PlanSizes sizes;
  PlanCost cost;
};

/// Calls visit(figures) for the plan of each rank, ascending. The plans themselves, which for thousands of ranks take minutes, are made
/// only for ring-full of a zigzag or striped partition and for gradients: else what is alike among ranks and among steps is counted once.
/// @throws InvalidArgument as make_plan
void for_figures_of_ranks(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing,
                          const std::function<void(const PlanFigures&)>& visit);

/// The same of some ranks, ascending.
void for_figures_of_some(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing,
                         std::span<const std::int64_t> ranks, const std::function<void(const PlanFigures&)>& visit);

}  // namespace annulus
