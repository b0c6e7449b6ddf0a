// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/fused_program.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/key_order.hpp>
#include <annulus/session/session.hpp>

#include "commands.hpp"
#include "report.hpp"
#include "standard_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

namespace annulus::app {

namespace {

/// ", kernel K" of a resolved configuration, where the backend has several.
std::string kernel_text(const Config& config) {
  return config.kernel == KernelKind::automatic ? std::string() : fmt::format(", kernel {}", to_string(config.kernel));
}

/// What the kernel of the configuration takes on a rank.
/// @param problem  of the rank's ring
Int128 partial_bytes(const Config& config, const Problem& problem, const Partition& partition, const PlanSizes& sizes) {
  switch (config.kernel) {
    case KernelKind::fused:
      // Its partials are of the rows that it carries from step to step, which only the plan tells.
      return fused_bytes(fused_program(make_plan(problem, config.pattern, partition, routing_of(config), sizes.rank)), problem.head_dim);
    case KernelKind::automatic:
    case KernelKind::cublas:
      break;
  }
  return whole_partials_bytes(problem, sizes, config.backend == BackendKind::reference ? 8 : 4);
}

}  // namespace

ExitCode execute_plan(const Invocation& invocation) {
  const ResolvedConfig resolved = resolve_without_job(invocation.config);
  const Config& config = resolved.config;
  const std::int64_t ranks = resolved.ranks;
  const Grid& grid = config.places;
  const Partition partition(config.partition, config.problem.seq_len, grid.seq);
  constexpr std::int64_t kLines = 16;
  constexpr std::int64_t kMostListed = 256;  // ranks whose links, up to their square, are listed one by one
  Json json{{"problem", to_json(config.problem)}, {"pattern", describe(config.pattern)}, {"ranks", ranks}};
  json["grid"] = {{"batch", grid.batch}, {"heads", grid.heads}, {"seq", grid.seq}};
  json["backend"] = fmt::format("{}{}", to_string(config.backend), kernel_text(config));
  json["ways"] = ways_text(config);
  json["key_order"] = describe_key_order(config.problem, config.pattern, partition, routing_of(config));
  Json list = Json::array();
  const LayerSource* const layer = resolved.layer.get();
  if (layer) { json["layer"] = to_json(*config.layer); }
  if (!invocation.json) {
    say("{}\n{}\n{} ranks{}, backend {}{}\n{}\n", describe(config.problem), describe(config.pattern), ranks,
        grid.rings() == 1 ? std::string() : fmt::format(" as {}", to_string(grid)), to_string(config.backend), kernel_text(config),
        ways_text(config));
    say("{}\n", describe_key_order(config.problem, config.pattern, partition, routing_of(config)));
    if (layer) { say("{}\n", describe(*config.layer)); }
    say("{:>6} {:>10} {:>6} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>6} {:>10}\n", "rank", "rows", "steps", "memory", "inputs+out",
        "partials", "slots", "sent B", "received B", "peers", "GFLOP");
  }
  Int128 bytes = 0;
  std::int64_t largest = 0;
  double flops = 0;
  Int128 busiest_link = 0;
  LayerCost layer_of_largest;
  const auto add = [&](const Problem& problem, std::int64_t first_rank, const PlanFigures& figures) {
    const auto& [sizes, cost] = figures;
    const std::int64_t rank = first_rank + sizes.rank;
    const MemoryPlan memory = plan_memory(problem, sizes, partial_bytes(config, problem, partition, sizes));
    LayerCost around;
    if (layer) { around = layer_cost_of(config, *layer, problem, sizes.local_rows); }
    if (around.flops > layer_of_largest.flops) { layer_of_largest = around; }
    const std::int64_t total = memory.total() + around.activation_bytes + around.weight_bytes + around.scratch_bytes;
    const double flops_of_rank = cost.flops + around.flops;
    bytes += cost.bytes_sent;
    flops += flops_of_rank;
    largest = std::max(largest, total);
    Int128 busiest_of_rank = 0;
    for (const LinkBytes& link : cost.links) { busiest_of_rank = std::max(busiest_of_rank, link.sent); }
    busiest_link = std::max(busiest_link, busiest_of_rank);
    if (invocation.json) {
      Json& of_rank = list.emplace_back(Json{{"rank", rank},
                                             {"rows", sizes.local_rows},
                                             {"steps", cost.steps},
                                             {"memory", total},
                                             {"bytes_sent", count_in_json(cost.bytes_sent)},
                                             {"bytes_received", count_in_json(cost.bytes_received)},
                                             {"flops", flops_of_rank},
                                             {"peers", cost.links.size()},
                                             {"busiest_link", count_in_json(busiest_of_rank)}});
      if (ranks > kMostListed) { return; }
      Json& links = of_rank["links"] = Json::array();
      for (const LinkBytes& link : cost.links) {
        links.push_back({{"peer", first_rank + link.peer}, {"sent", count_in_json(link.sent)}, {"received", count_in_json(link.received)}});
      }
    } else if (rank < kLines) {
      say("{:>6} {:>10} {:>6} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>6} {:>10.3f}\n", rank, sizes.local_rows, cost.steps,
          human_bytes(total), human_bytes(memory.inputs + memory.outputs), human_bytes(memory.partials), human_bytes(memory.slots),
          cost.bytes_sent, cost.bytes_received, cost.links.size(), flops_of_rank / 1e9);
    }
  };
  for (std::int64_t ring = 0; ring < grid.rings(); ++ring) {
    const Problem problem = cell_of(config.problem, grid, ring).problem;
    for_figures_of_ranks(problem, config.pattern, partition, routing_of(config),
                         [&](const PlanFigures& figures) { add(problem, ring * grid.seq, figures); });
  }
  if (layer) {
    json["layer"]["weight_bytes"] = layer_of_largest.weight_bytes;
    json["layer"]["activation_bytes"] = layer_of_largest.activation_bytes;
    json["layer"]["scratch_bytes"] = layer_of_largest.scratch_bytes;
    json["layer"]["flops_of_largest"] = layer_of_largest.flops;
  }
  if (invocation.json) {
    json["bytes_sent"] = count_in_json(bytes);
    json["flops"] = flops;
    json["largest_memory"] = largest;
    json["per_rank"] = std::move(list);
    say("{}\n", json.dump(2));
    return ExitCode::passed;
  }
  if (ranks > kLines) { say("   ... {} more ranks; --json has all of them\n", ranks - kLines); }
  if (layer) {
    say("layer of the largest rank: {} of weights, {} of activations, {} of scratch, {:.4g} GFLOP; memory and GFLOP above hold it\n",
        human_bytes(layer_of_largest.weight_bytes), human_bytes(layer_of_largest.activation_bytes),
        human_bytes(layer_of_largest.scratch_bytes), layer_of_largest.flops / 1e9);
  }
  say("all ranks: {} bytes sent, at most {} over one link; {:.4g} GFLOP; largest memory {} (without the backend's workspace)\n", bytes,
      busiest_link, flops / 1e9, human_bytes(largest));
  return ExitCode::passed;
}

}  // namespace annulus::app
