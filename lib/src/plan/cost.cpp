// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/cost.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <map>

namespace annulus {

namespace {

/// sum over 0 <= i < n of floor((a*i + b) / m), for a, b >= 0 and m >= 1, in O(log m): the Euclid-like lattice point count.
Int128 floor_sum(std::int64_t n, std::int64_t m, std::int64_t a, std::int64_t b) {
  Int128 total = 0;
  Int128 count = n;
  Int128 modulus = m;
  Int128 slope = a;
  Int128 shift = b;
  while (count > 0) {
    total += (count - 1) * count / 2 * (slope / modulus) + count * (shift / modulus);
    slope %= modulus;
    shift %= modulus;
    const Int128 top = slope * count + shift;
    if (top < modulus) { break; }
    count = top / modulus;
    shift = top % modulus;
    std::swap(modulus, slope);
  }
  return total;
}

/// Visible pairs of one segment and head under the causal mask: for each query, the keys at or before it.
Int128 causal_pairs(const Progression& q, const Progression& k) {
  // Queries before `first` see nothing; from `full` on they see every key; between them the count grows by a floor.
  const std::int64_t first = std::clamp<std::int64_t>(ceil_div(k.first - q.first, q.stride), 0, q.count);
  const std::int64_t full = std::clamp<std::int64_t>(ceil_div(k.last() - q.first, q.stride), first, q.count);
  const std::int64_t growing = full - first;
  const std::int64_t base = q[first] - k.first;
  return static_cast<Int128>(q.count - full) * k.count + (growing > 0 ? floor_sum(growing, k.stride, q.stride, base) + growing : Int128{0});
}

/// Pairs of one segment and head, without a mask, whose key lies from the query's own block down.
Int128 pairs_down(const WorkItem& item) {
  const kernels::SegmentPlace& place = item.place;
  const std::int64_t q_rows = item.q_global.count();
  const std::int64_t k_rows = item.k_global.count();
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
Int128 unmasked_pairs(const WorkItem& item) {
  const Int128 all = static_cast<Int128>(item.q_global.count()) * item.k_global.count();
  switch (item.place.part) {
    case kernels::KeyPart::all:
      break;
    case kernels::KeyPart::down:
      return pairs_down(item);
    case kernels::KeyPart::above:
      return all - pairs_down(item);
  }
  return all;
}

/// Visible pairs of one segment and head.
Int128 segment_pairs(const WorkItem& item) {
  switch (item.mask) {
    case kernels::Mask::none:
      return unmasked_pairs(item);
    case kernels::Mask::causal:
      break;
  }
  ANNULUS_ASSERT(item.place.part == kernels::KeyPart::all, "a causal item with a part of its keys");
  return causal_pairs(item.q_global.only(), item.k_global.only());
}

}  // namespace

Int128 visible_pairs(const WorkItem& item) {
  const std::int64_t heads = item.heads.kv.count * item.heads.q_per_kv;
  return segment_pairs(item) * item.segments * heads;
}

PlanCost plan_cost(const RingPlan& plan) {
  PlanCost cost;
  std::map<std::int64_t, LinkBytes> links;
  for (const Step& step : plan.steps) {
    for (const WorkItem& item : step.work) { cost.pairs += plan.problem.batch * visible_pairs(item); }
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
  cost.flops = 4.0 * static_cast<double>(plan.problem.head_dim) * static_cast<double>(cost.pairs);
  cost.steps = static_cast<std::int64_t>(plan.steps.size());
  return cost;
}

Int128 whole_partials_bytes(const RingPlan& plan, std::int64_t accumulator_bytes) {
  const Problem& problem = plan.problem;
  const std::int64_t rows = problem.batch * plan.local_rows * problem.heads;
  return static_cast<Int128>(plan.partials) * accumulator_bytes * (rows * problem.head_dim + 2 * rows);
}

MemoryPlan plan_memory(const RingPlan& plan, Int128 partials) {
  const Problem& problem = plan.problem;
  const std::int64_t rows = problem.batch * plan.local_rows;
  const std::int64_t q_elements = rows * problem.heads * problem.head_dim;
  MemoryPlan memory;
  memory.inputs = q_elements * size_of(problem.dtype) + buffer_bytes(plan, BufferId::resident);
  memory.outputs = q_elements * size_of(problem.dtype) + rows * problem.heads * static_cast<std::int64_t>(sizeof(float));
  constexpr Int128 kMost = Int128{1} << 60;  // of each of four summands, so that their sum stays below 2^62
  const Int128 slots = static_cast<Int128>(plan.slot_bytes[0]) + plan.slot_bytes[1] + plan.send_bytes[0] + plan.send_bytes[1];
  ANNULUS_EXPECTS(
      partials <= kMost && slots <= kMost && memory.inputs <= kMost && memory.outputs <= kMost,
      "rank {} needs {} bytes for inputs, {} for outputs, {} for partials and {} for messages; no more than 2^60 of each are planned for",
      plan.rank, memory.inputs, memory.outputs, partials, slots);
  memory.partials = static_cast<std::int64_t>(partials);
  memory.slots = static_cast<std::int64_t>(slots);
  return memory;
}

}  // namespace annulus
