// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/result_file.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/key_order.hpp>
#include <annulus/session/result_sink.hpp>
#include <annulus/session/session.hpp>

#include "commands.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "standard_output.hpp"

#include <fmt/format.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace annulus::app {

namespace {

std::string setup_line(const Session& session) {
  const Grid& grid = session.grid();
  return fmt::format("{} rank{}{} over {}, backend {}", session.ranks(), session.ranks() == 1 ? "" : "s",
                     grid.rings() == 1 ? std::string() : fmt::format(" as {}", to_string(grid)), to_string(session.transport_kind()),
                     session.kernel().describe());
}

std::string key_order_line(const Session& session) {
  const Config& config = session.resolved().config;
  return describe_key_order(config.problem, config.pattern, session.partition(), routing_of(config));
}

std::vector<std::pair<std::string, std::string>> result_provenance(const Invocation& invocation, const Session& session,
                                                                   const std::string& hosts) {
  auto entries = provenance(invocation, session.resolved().config);
  entries.emplace_back("key_order", key_order_line(session));
  entries.emplace_back("backend", session.kernel().describe());
  entries.emplace_back("transport", std::string(to_string(session.transport_kind())));
  entries.emplace_back("ranks", std::to_string(session.ranks()));
  entries.emplace_back("grid", to_string(session.grid()));
  entries.emplace_back("input", session.resolved().input().describe());
  entries.emplace_back("hosts", hosts);
  return entries;
}

void print_timings(const std::vector<std::vector<StepTiming>>& timings) {
  say("{:>5} {:>5} {:>12} {:>12} {:>12} {:>14} {:>14}\n", "rank", "step", "compute ms", "comm ms", "exposed ms", "sent B", "received B");
  constexpr std::size_t kLines = 32;
  std::size_t lines = 0;
  for (std::size_t rank = 0; rank < timings.size(); ++rank) {
    for (std::size_t step = 0; step < timings[rank].size(); ++step) {
      if (lines++ >= kLines) { continue; }
      const StepTiming& t = timings[rank][step];
      say("{:>5} {:>5} {:>12.3f} {:>12.3f} {:>12.3f} {:>14} {:>14}\n", rank, step, t.compute_ms, t.communication_ms, t.exposed_ms,
          t.bytes_sent, t.bytes_received);
    }
  }
  if (lines > kLines) { say("  ... {} more lines; the result file and --json have all of them\n", lines - kLines); }
}

}  // namespace

ExitCode execute_run(const Invocation& invocation, const Communicator& comm) {
  const Progress progress(comm.rank() == 0 && !invocation.json);
  const ResolvedConfig resolved = resolve(invocation.config, comm);
  const std::unique_ptr<ResultFile> file = create_result(resolved, comm);
  Session session(resolved, comm);
  progress.show("reading input");
  session.load();
  progress.show("attending");
  session.run();
  progress.show("");
  const double ms = session.slowest_ms();
  const std::vector<std::vector<StepTiming>> timings = gather_timings(comm, session.local_timings());
  double flops = 0;
  double layer_flops = 0;
  std::int64_t received = 0;
  for (const auto& executor : session.executors()) {
    const PlanCost cost = plan_cost(executor->plan());
    flops += cost.flops;
    received += static_cast<std::int64_t>(cost.bytes_received);  // of memory that is there
    const RingPlan& plan = executor->plan();
    if (resolved.layer) { layer_flops += layer_cost_of(resolved.config, *resolved.layer, plan.problem, plan.local_rows).flops; }
  }
  layer_flops = comm.sum(layer_flops);
  const Session::LayerMs layer_ms = session.layer_ms();
  const double backward_ms = session.backward_ms();
  flops = comm.sum(flops) + layer_flops;
  received = comm.sum(received);
  const RowCounts counts = count_rows(session);
  const ExitCode code = counts.non_finite == 0 ? ExitCode::passed : ExitCode::check_failed;
  const MemoryReport memory = session.device().memory();
  const std::int64_t high_water = comm.max(memory.high_water);
  const std::int64_t device_own = comm.max(memory.device_own);
  const std::int64_t device_others = comm.max(memory.device_others);
  const std::int64_t predicted = comm.max(session.predicted_bytes());
  const std::string hosts = host_lines(comm, session.kernel().describe());
  const std::string& output = resolved.config.output;
  if (!output.empty()) {
    progress.show("writing " + output);
    write_result(session, file.get(), timings, counts, result_provenance(invocation, session, hosts));
    progress.show("");
  }
  if (comm.rank() != 0) { return code; }
  if (counts.non_finite > 0) { print_error(line_of(counts)); }
  if (invocation.json) {
    Json json{{"problem", to_json(session.problem())}, {"pattern", describe(session.pattern())}, {"setup", setup_line(session)}};
    json["ways"] = ways_text(session.resolved().config);
    json["key_order"] = key_order_line(session);
    json["total_ms"] = ms;
    json["tflops"] = flops / ms / 1e9;
    json["bytes_received"] = received;
    json["uncovered"] = counts.uncovered;
    json["non_finite"] = counts.non_finite;
    if (resolved.config.gradients) { json["backward_ms"] = backward_ms; }
    if (resolved.layer) {
      json["layer"] = to_json(*resolved.config.layer);
      json["layer"]["flops"] = layer_flops;
      json["layer"]["project_ms"] = layer_ms.project;
      json["layer"]["finish_ms"] = layer_ms.finish;
    }
    if (!counts.zero_key_shares.empty()) { json["zero_key_shares"] = counts.zero_key_shares; }
    if (counts.non_finite > 0) { json["first_non_finite"] = counts.first_non_finite; }
    json["memory"] = {{"high_water", high_water}, {"planned", predicted}, {"device_own", device_own}, {"device_others", device_others}};
    json["timings"] = to_json(timings);
    json["output"] = output;
    say("{}\n", json.dump(2));
    return code;
  }
  say("{}\n{}\n{}\n{}\n{}\n", describe(session.problem()), describe(session.pattern()), setup_line(session),
      ways_text(session.resolved().config), key_order_line(session));
  if (resolved.layer) { say("{}\n", describe(*resolved.config.layer)); }
  print_timings(timings);
  if (resolved.layer) {
    say("layer: {:.3f} ms for q, k and v, {:.3f} ms for y (slowest rank), {:.4g} GFLOP over all ranks\n", layer_ms.project, layer_ms.finish,
        layer_flops / 1e9);
  }
  if (resolved.config.gradients) { say("backward pass: {:.3f} ms of it (slowest rank)\n", backward_ms); }
  say("time {:.3f} ms (slowest rank), {:.4g} TFLOP/s over all ranks{}\n", ms, flops / ms / 1e9,
      resolved.config.share_gpu ? "; ranks share a GPU, so times mean nothing" : "");
  say("received {} bytes, as planned; rows that see no key: {} (batch, head, row)\n", received, counts.uncovered);
  if (!counts.zero_key_shares.empty()) { say("{}\n", zero_keys_line(counts)); }
  if (counts.non_finite > 0) { say("{}\n", line_of(counts)); }
  say("memory of the largest rank: {} at most, {} planned\n", human_bytes(high_water), human_bytes(predicted));
  if (device_own > 0) {
    say("of the GPU's memory: {} taken for it, {} by contexts, libraries and other processes\n", human_bytes(device_own),
        human_bytes(device_others));
  }
  if (!output.empty()) { say("wrote {}\n", output); }
  return code;
}

}  // namespace annulus::app
