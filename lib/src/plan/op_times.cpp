// SPDX-License-Identifier: Apache-2.0
#include "op_times.hpp"

#include <annulus/plan/cost.hpp>

#include <algorithm>

namespace annulus::planning {

namespace {

constexpr double kMsPerUs = 1e-3;

double partial_bytes(const RingPlan& plan) { return static_cast<double>(whole_partials_bytes(plan.problem, sizes_of(plan), 4)); }

/// The arithmetic of an item at its rate, which depends on how far apart its rows lie in memory, and so in the shard.
double item_ms(const WorkItem& item, const RingPlan& plan, const Machine& machine) {
  const auto q_rows = static_cast<double>(item.q_global.count());
  const auto k_rows = static_cast<double>(item.k_global.count());
  const double rows = 2 * q_rows * k_rows / (q_rows + k_rows);
  const Problem& problem = plan.problem;
  const double flops = 4.0 * static_cast<double>(problem.head_dim) * static_cast<double>(visible_pairs(problem, item));
  return 1e3 * flops / machine.flops_per_s(problem.dtype, problem.head_dim, item.mask, item.q_local.only().stride, rows);
}

std::int64_t tiles_of(const WorkItem& item, const RingPlan& plan, const Machine& machine) {
  return ceil_div(item.q_global.count(), machine.tile_rows) * item.heads.kv.count * item.heads.q_per_kv * item.segments *
         plan.problem.batch;
}

}  // namespace

double begin_ms(const RingPlan& plan, const Machine& machine) {
  if (!machine.partials.times().empty()) { return 0; }  // with finish
  return kMsPerUs * machine.copy.us(partial_bytes(plan) / 2);
}

double pack_ms(const Step& step, const RingPlan& plan, const Machine& machine) {
  double ms = 0;
  for (const PackItem& item : step.packs) { ms += kMsPerUs * machine.copy.us(static_cast<double>(plan.blocks[item.block].bytes)); }
  return ms;
}

double attend_ms(const Step& step, const RingPlan& plan, const Machine& machine) {
  double all = 0;
  for (auto item = step.work.begin(); item != step.work.end();) {
    const std::int64_t wave = item->wave;
    double ms = 0;
    std::int64_t tiles = 0;
    for (; item != step.work.end() && item->wave == wave; ++item) {
      ms += item_ms(*item, plan, machine);
      tiles += tiles_of(*item, plan, machine);
    }
    const std::int64_t turns = ceil_div(tiles, machine.lanes);
    all += kMsPerUs * machine.launch_gap_us +
           ms * static_cast<double>(turns * machine.lanes) / static_cast<double>(std::max<std::int64_t>(tiles, 1));
  }
  return all;
}

double finish_ms(const RingPlan& plan, const Machine& machine) {
  if (!machine.partials.times().empty()) { return kMsPerUs * machine.partials.us(partial_bytes(plan)); }
  const auto outputs = static_cast<double>(plan_memory(plan.problem, sizes_of(plan), 0).outputs);
  return kMsPerUs * machine.copy.us((partial_bytes(plan) + outputs) / 2);
}

}  // namespace annulus::planning
