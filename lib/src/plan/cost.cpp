// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/cost.hpp>

#include <annulus/core/error.hpp>
#include <annulus/plan/item_parts.hpp>

#include "pairs.hpp"

#include <algorithm>
#include <map>

namespace annulus {

using planning::causal_pairs;
using planning::floor_sum;

namespace {

/// Pairs of one segment and head, without a mask, whose key lies from the query's own block down.
Int128 pairs_down(const WorkItem& item, std::int64_t k_rows) {
  const kernels::SegmentPlace& place = item.place;
  const std::int64_t q_rows = item.q_global.count();
  // A query at place p has the keys before place (floor(p / block) + 1) * block: none for the first ones, all from `full` on.
  const auto first_with = [&](std::int64_t key_end) {
    return std::clamp<std::int64_t>((ceil_div(key_end, place.block_rows) - 1) * place.block_rows - place.q_first, 0, q_rows);
  };
  const std::int64_t first = first_with(place.k_first + 1);
  const std::int64_t full = first_with(place.k_first + k_rows);
  const std::int64_t growing = full - first;
  const Int128 blocks = growing > 0 ? floor_sum(growing, place.block_rows, 1, place.q_first + first) + growing : Int128{0};
  return blocks * place.block_rows - static_cast<Int128>(growing) * place.k_first + static_cast<Int128>(q_rows - full) * k_rows;
}

/// Pairs of one segment and head, without a mask.
Int128 unmasked_pairs(const WorkItem& item, std::int64_t k_rows) {
  const Int128 all = static_cast<Int128>(item.q_global.count()) * k_rows;
  switch (item.place.part) {
    case kernels::KeyPart::all:
      break;
    case kernels::KeyPart::down:
      return pairs_down(item, k_rows);
    case kernels::KeyPart::above:
      return all - pairs_down(item, k_rows);
  }
  return all;
}

/// Visible pairs of one segment and head with the keys `keys` of the item, its first ones.
Int128 segment_pairs(const WorkItem& item, const Progression& keys) {
  switch (item.mask) {
    case kernels::Mask::none:
      return unmasked_pairs(item, keys.count);
    case kernels::Mask::causal:
      break;
  }
  ANNULUS_ASSERT(item.place.part == kernels::KeyPart::all, "a causal item with a part of its keys");
  return causal_pairs(item.q_global.only(), keys);
}

}  // namespace

Int128 visible_pairs(const Problem& problem, const WorkItem& item) {
  const std::int64_t heads = item.heads.kv.count * item.heads.q_per_kv;
  Int128 pairs = 0;
  for (const ItemPart& part : parts_of(problem, item)) {
    pairs += segment_pairs(item, item.k_global.only().first_ones(part.keys)) * part.segments * part.entries * heads;
  }
  return pairs;
}

PlanCost plan_cost(const RingPlan& plan) {
  PlanCost cost;
  std::map<std::int64_t, LinkBytes> links;
  for (std::int64_t number = 0; number < std::ssize(plan.steps); ++number) {
    const Step& step = plan.steps[number];
    Int128& pairs = number < plan.forward_steps ? cost.pairs : cost.gradient_pairs;
    for (const WorkItem& item : step.work) { pairs += visible_pairs(plan.problem, item); }
    for (const Message& message : step.sends) {
      links[message.peer].sent += message.bytes;
      cost.bytes_sent += message.bytes;
      ++cost.messages_sent;
    }
    for (const Message& message : step.receives) {
      links[message.peer].received += message.bytes;
      cost.bytes_received += message.bytes;
    }
  }
  for (auto& [peer, link] : links) {
    link.peer = peer;
    cost.links.push_back(link);
  }
  cost.flops = 4.0 * static_cast<double>(plan.problem.head_dim) * static_cast<double>(cost.pairs) + gradient_flops(plan.problem, cost);
  cost.steps = static_cast<std::int64_t>(plan.steps.size());
  return cost;
}

double gradient_flops(const Problem& problem, const PlanCost& cost) {
  // The scores again, dP, and what comes of them for dQ, dK and dV.
  return 10.0 * static_cast<double>(problem.head_dim) * static_cast<double>(cost.gradient_pairs);
}

Int128 whole_partials_bytes(const Problem& problem, const PlanSizes& sizes, std::int64_t accumulator_bytes) {
  const std::int64_t rows = problem.batch * sizes.local_rows * problem.heads;
  return static_cast<Int128>(sizes.partials) * accumulator_bytes * (rows * problem.head_dim + 2 * rows);
}

MemoryPlan plan_memory(const Problem& problem, const PlanSizes& sizes, Int128 partials) {
  const std::int64_t rows = problem.batch * sizes.local_rows;
  const std::int64_t q_bytes = rows * problem.heads * problem.head_dim * size_of(problem.dtype);
  MemoryPlan memory;
  memory.inputs = q_bytes + resident_bytes(problem, sizes.local_rows) + extra_bytes(problem, sizes.rank);
  memory.outputs = q_bytes + rows * problem.heads * static_cast<std::int64_t>(sizeof(float));
  constexpr Int128 kMost = Int128{1} << 60;  // of each of four summands, so that their sum stays below 2^62
  Int128 slots = 0;
  for (const std::int64_t bytes : sizes.slot_bytes) { slots += bytes; }
  for (const std::int64_t bytes : sizes.send_bytes) { slots += bytes; }
  if (sizes.gradients) {
    const std::int64_t resident = resident_bytes(problem, sizes.local_rows);
    ANNULUS_EXPECTS(q_bytes <= kMost && resident <= kMost / 4, "rank {} needs more than 2^60 bytes for gradients", sizes.rank);
    memory.gradients = 2 * q_bytes + resident + gradient_bytes(problem, resident);
  }
  ANNULUS_EXPECTS(
      partials <= kMost && slots <= kMost && memory.inputs <= kMost && memory.outputs <= kMost,
      "rank {} needs {} bytes for inputs, {} for outputs, {} for partials and {} for messages; no more than 2^60 of each are planned for",
      sizes.rank, memory.inputs, memory.outputs, partials, slots);
  memory.partials = static_cast<std::int64_t>(partials);
  memory.slots = static_cast<std::int64_t>(slots);
  return memory;
}

PlanSizes sizes_of(const RingPlan& plan) {
  return {plan.rank, plan.local_rows, plan.partials, plan.slot_bytes, plan.send_bytes, plan.routing.gradients};
}

}  // namespace annulus
