// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/plan/plan.hpp>

#include "work.hpp"

#include <limits>
#include <utility>

namespace annulus {

namespace {

/// The order of a ring: messages of step t start before the work of step t-1, and have come before the work of step t.
std::vector<Op> ops_of(std::int64_t steps) {
  std::vector<Op> ops;
  std::int64_t turn = 0;
  const auto add = [&](OpKind kind, std::int64_t step) {
    ops.push_back({kind, step, turn});
    if (kind != OpKind::pack) { ++turn; }  // packs go with the post of their step
  };
  for (std::int64_t step = 0; step < steps; ++step) {
    if (step > 0) { add(OpKind::wait, step); }
    if (step + 1 < steps) {
      add(OpKind::pack, step + 1);
      add(OpKind::post, step + 1);
    } else {
      ++turn;  // the other ranks may have more steps
    }
    add(OpKind::attend, step);
  }
  // After the work of all ranks, however many steps they have.
  ops.push_back({OpKind::finish, 0, std::numeric_limits<std::int64_t>::max()});
  return ops;
}

}  // namespace

std::int64_t block_elements(const Problem& problem, const KvBlock& block) {
  return problem.batch * block.rows_global.count() * block.kv_heads.count * problem.head_dim;
}

std::int64_t buffer_bytes(const RingPlan& plan, BufferId buffer) {
  switch (buffer) {
    case BufferId::slot_0:
    case BufferId::slot_1:
      return plan.slot_bytes[buffer == BufferId::slot_0 ? 0 : 1];
    case BufferId::send_0:
    case BufferId::send_1:
      return plan.send_bytes[buffer == BufferId::send_0 ? 0 : 1];
    case BufferId::resident:
      break;
  }
  const Problem& problem = plan.problem;
  return 2 * problem.batch * plan.local_rows * problem.kv_heads * problem.head_dim * size_of(problem.dtype);
}

RingPlan make_plan(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing, std::int64_t rank) {
  validate(problem);
  validate(pattern);
  ANNULUS_EXPECTS(partition.seq_len() == problem.seq_len, "the partition is of {} tokens, the problem of {}", partition.seq_len(),
                  problem.seq_len);
  const bool cyclic = routing.key_order == KeyOrder::cyclic;
  ANNULUS_EXPECTS(routing.key_order != KeyOrder::automatic && (routing.block_rows > 0) == cyclic, "key order {} with blocks of {} rows",
                  to_string(routing.key_order), routing.block_rows);
  planning::Setting setting{problem, pattern, partition, routing, rank, partition.shard(rank), {}};
  for (std::int64_t branch = 0; branch < std::ssize(pattern.branches); ++branch) {
    setting.classes.push_back(head_classes(problem, pattern, branch));
  }
  planning::Routes routes = planning::routes_of(setting, routing.schedule);
  planning::Layout layout = planning::lay_out(setting, routes);
  planning::add_work(setting, routes, layout);

  RingPlan plan;
  plan.problem = problem;
  plan.pattern = pattern;
  plan.rank = rank;
  plan.ranks = partition.ranks();
  plan.routing = routing;
  plan.local_rows = setting.shard.rows();
  plan.blocks = std::move(routes.blocks);
  plan.ops = ops_of(std::ssize(layout.steps));
  plan.steps = std::move(layout.steps);
  plan.partials = planning::partials_of(setting);
  plan.shard = std::move(setting.shard);
  plan.slot_bytes = layout.slot_bytes;
  plan.send_bytes = layout.send_bytes;
  return plan;
}

}  // namespace annulus
