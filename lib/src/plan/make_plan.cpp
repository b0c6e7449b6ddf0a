// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/plan/plan.hpp>

#include "gradients.hpp"
#include "work.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace annulus {

namespace {

/// Messages of step t start before the work of step t - ahead, and have come before the work of step t. Turns depend on the step alone:
/// the other ranks may have more of them. In the backward pass, steps from `forward` on, all go one step ahead: what is sent there was made
/// two steps before.
std::vector<Op> ops_of(std::int64_t steps, std::int64_t forward, std::int64_t ahead) {
  std::vector<Op> ops;
  std::int64_t posted = 0;
  for (std::int64_t step = 0; step < steps; ++step) {
    const bool backward = step >= forward;
    if (step > 0) { ops.push_back({OpKind::wait, step, 3 * step - 1}); }
    if (backward) { ops.push_back({OpKind::accumulate, step, 3 * step - 1}); }
    const std::int64_t next = backward ? step + 1 : std::min(step + ahead, forward);
    while (posted < std::min(next, steps - 1)) {
      ++posted;
      ops.push_back({OpKind::pack, posted, 3 * step});
      ops.push_back({OpKind::post, posted, 3 * step});
    }
    ops.push_back({backward ? OpKind::differentiate : OpKind::attend, step, 3 * step + 1});
    if (step == forward - 1 && forward < steps) { ops.push_back({OpKind::finish, 0, 3 * step + 1}); }
  }
  // After the work of all ranks, however many steps they have.
  ops.push_back({forward < steps ? OpKind::finish_gradients : OpKind::finish, 0, std::numeric_limits<std::int64_t>::max()});
  return ops;
}

/// Steps that no rank's forward pass has more of, told from the lengths alone.
std::int64_t most_forward_steps(const Problem& problem, const Pattern& pattern, const Partition& partition, Schedule schedule) {
  std::int64_t pieces = 1;  // in which a segment lies, at most
  const std::int64_t all = partition.ranks() * (partition.kind() == PartitionKind::zigzag ? 2 : 1);
  for (const Branch& branch : pattern.branches) {
    const std::int64_t length = std::min(branch.segment_length, problem.seq_len);
    const std::int64_t smallest = problem.seq_len / all;
    const std::int64_t touched = !partition.keeps_neighbours() ? length
                                 : smallest == 0               ? all
                                                               : (length < 2 ? 1 : (length - 2) / smallest + 2);
    pieces = std::max(pieces, std::min(touched, all));
  }
  switch (schedule) {
    case Schedule::allgather:
      return 2;
    case Schedule::direct:
      return problem.causal && partition.keeps_neighbours() ? 2 * pieces : pieces;
    case Schedule::ring_full:
      return partition.ranks();
    case Schedule::ring:
    case Schedule::automatic:  // make_setting refuses it
      break;
  }
  return std::min(pieces, partition.ranks());
}

}  // namespace

std::int64_t block_bytes(const Problem& problem, std::int64_t rows, std::int64_t kv_heads) {
  return 2 * problem.batch * rows * kv_heads * problem.head_dim * size_of(problem.dtype);
}

std::int64_t extra_bytes(const Problem& problem, std::int64_t rank) {
  return rank == 0 ? block_bytes(problem, problem.extra_keys, problem.kv_heads) : 0;
}

std::int64_t gradient_bytes(const Problem& problem, std::int64_t kv_bytes) {
  return kv_bytes / size_of(problem.dtype) * static_cast<std::int64_t>(sizeof(float));
}

std::int64_t resident_bytes(const Problem& problem, std::int64_t local_rows) { return block_bytes(problem, local_rows, problem.kv_heads); }

std::int64_t resident_offset(const Problem& problem, const ShardPiece& piece) { return resident_bytes(problem, piece.local_first); }

std::int64_t buffer_bytes(const RingPlan& plan, BufferId buffer) {
  switch (buffer) {
    case BufferId::slot_0:
      return plan.slot_bytes[0];
    case BufferId::slot_1:
      return plan.slot_bytes[1];
    case BufferId::slot_2:
      return plan.slot_bytes[2];
    case BufferId::slot_3:
      return plan.slot_bytes[3];
    case BufferId::send_0:
      return plan.send_bytes[0];
    case BufferId::send_1:
      return plan.send_bytes[1];
    case BufferId::extra:
      return extra_bytes(plan.problem, plan.rank);
    case BufferId::own_gradient:
      return gradient_bytes(plan.problem, resident_bytes(plan.problem, plan.local_rows));
    case BufferId::resident:
      break;
  }
  return resident_bytes(plan.problem, plan.local_rows);
}

std::int64_t steps_ahead(Schedule schedule) {
  switch (schedule) {
    case Schedule::automatic:
    case Schedule::ring:
    case Schedule::ring_full:
    case Schedule::allgather:
      break;
    case Schedule::direct:
      return 2;
  }
  return 1;
}

bool keeps_key_order(PartitionKind partition, Schedule schedule, bool causal) {
  switch (partition) {
    case PartitionKind::contiguous:
      return true;
    case PartitionKind::striped:  // every rank has some of each block
      return false;
    case PartitionKind::zigzag:
    case PartitionKind::automatic:
      break;
  }
  switch (schedule) {
    case Schedule::automatic:
    case Schedule::ring:
    case Schedule::ring_full:
      return false;
    case Schedule::direct:
    case Schedule::allgather:
      break;
  }
  return causal;
}

RingPlan make_plan(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing, std::int64_t rank) {
  planning::Setting setting = planning::make_setting(problem, pattern, partition, routing, rank);
  planning::Routes routes = planning::routes_of(setting, routing.schedule);
  planning::Layout layout = planning::lay_out(setting, routes);
  planning::add_work(setting, routes, layout);
  std::int64_t forward = std::ssize(layout.steps);
  if (routing.gradients) {
    ANNULUS_EXPECTS(problem.extra_keys == 0, "a plan with gradients of {} extra keys", problem.extra_keys);
    forward = most_forward_steps(problem, pattern, partition, routing.schedule);
    planning::add_gradients(setting, routes, layout, forward);
  }

  RingPlan plan;
  plan.problem = problem;
  plan.pattern = pattern;
  plan.rank = rank;
  plan.ranks = partition.ranks();
  plan.routing = routing;
  plan.local_rows = setting.shard.rows();
  plan.blocks = std::move(routes.blocks);
  plan.forward_steps = forward;
  plan.ops = ops_of(std::ssize(layout.steps), forward, steps_ahead(routing.schedule));
  plan.steps = std::move(layout.steps);
  plan.partials = planning::partials_of(setting);
  plan.extra_partial = planning::extra_partial_of(setting);
  plan.shard = std::move(setting.shard);
  plan.slot_bytes = layout.slot_bytes;
  plan.send_bytes = layout.send_bytes;
  return plan;
}

}  // namespace annulus
