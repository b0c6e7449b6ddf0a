// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/result_file.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/key_order.hpp>
#include <annulus/session/batch_parts.hpp>
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
                                                                   const std::string& settings, const std::string& hosts) {
  auto entries = provenance(invocation, session.resolved().config);
  entries.emplace_back("key_order", key_order_line(session));
  entries.emplace_back("backend", session.kernel().describe());
  entries.emplace_back("transport", std::string(to_string(session.transport_kind())));
  entries.emplace_back("ranks", std::to_string(session.ranks()));
  entries.emplace_back("grid", to_string(session.grid()));
  entries.emplace_back("input", session.resolved().input().describe());
  if (!settings.empty()) { entries.emplace_back("settings", settings); }
  entries.emplace_back("hosts", hosts);
  return entries;
}

/// What memory and plans came to, for /provenance.
void add_services(std::vector<std::pair<std::string, std::string>>& entries, const Session& session, const ServiceReport& services) {
  entries.emplace_back("memory",
                       fmt::format("{} bytes at most, {} planned; {} allocations of the system, {} of a pool's ({})", services.high_water,
                                   services.planned, services.taken, services.reused, to_string(session.resolved().config.memory_pool)));
  entries.emplace_back("plans", fmt::format("{} made, {} found", services.plans_made, services.plans_found));
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

/// What one pass over a problem, or over one part of its batch, came to.
struct Pass {
  PartReport report;
  double flops = 0;
  double layer_flops = 0;
  Session::LayerMs layer_ms;
  double backward_ms = 0;
  std::int64_t received = 0;
};

/// Loads, attends and counts. Collective.
Pass pass_over(Session& session, const Progress& progress, const std::string& which) {
  const Communicator& comm = session.comm();
  const ResolvedConfig& resolved = session.resolved();
  progress.show("reading input" + which);
  session.load();
  progress.show("attending" + which);
  session.run();
  progress.show("");
  Pass pass;
  pass.report.ms = session.slowest_ms();
  pass.report.timings = gather_timings(comm, session.local_timings());
  for (const auto& executor : session.executors()) {
    const PlanCost cost = plan_cost(executor->plan());
    pass.flops += cost.flops;
    pass.received += static_cast<std::int64_t>(cost.bytes_received);  // of memory that is there
    const RingPlan& plan = executor->plan();
    if (resolved.layer) { pass.layer_flops += layer_cost_of(resolved.config, *resolved.layer, plan.problem, plan.local_rows).flops; }
  }
  pass.layer_flops = comm.sum(pass.layer_flops);
  pass.layer_ms = session.layer_ms();
  pass.backward_ms = session.backward_ms();
  pass.flops = comm.sum(pass.flops) + pass.layer_flops;
  pass.received = comm.sum(pass.received);
  pass.report.tflops = pass.flops / pass.report.ms / 1e9;
  pass.report.counts = count_rows(session);
  return pass;
}

/// What every run's JSON begins with.
Json json_of_setup(const Session& session) {
  Json json{{"problem", to_json(session.problem())}, {"pattern", describe(session.pattern())}, {"setup", setup_line(session)}};
  json["ways"] = ways_text(session.resolved().config);
  json["key_order"] = key_order_line(session);
  return json;
}

void add_counts(Json& json, const RowCounts& counts) {
  json["uncovered"] = counts.uncovered;
  json["non_finite"] = counts.non_finite;
  if (!counts.zero_key_shares.empty()) { json["zero_key_shares"] = counts.zero_key_shares; }
  if (counts.non_finite > 0) { json["first_non_finite"] = counts.first_non_finite; }
}

void add_services(Json& json, const ServiceReport& services) {
  json["memory"] = {{"high_water", services.high_water},   {"planned", services.planned},
                    {"allocations_taken", services.taken}, {"allocations_reused", services.reused},
                    {"device_own", services.device_own},   {"device_others", services.device_others}};
  json["plans"] = {{"made", services.plans_made}, {"found", services.plans_found}};
}

void print_setup(const Session& session) {
  say("{}\n{}\n{}\n{}\n{}\n", describe(session.problem()), describe(session.pattern()), setup_line(session),
      ways_text(session.resolved().config), key_order_line(session));
  if (session.resolved().layer) { say("{}\n", describe(*session.resolved().config.layer)); }
}

void print_counts(const RowCounts& counts) {
  if (!counts.zero_key_shares.empty()) { say("{}\n", zero_keys_line(counts)); }
  if (counts.non_finite > 0) { say("{}\n", line_of(counts)); }
}

void print_memory(const ServiceReport& memory) {
  say("memory of the largest rank: {} at most, {} planned\n", human_bytes(memory.high_water), human_bytes(memory.planned));
  if (memory.device_own > 0) {
    say("of the GPU's memory: {} taken for it, {} by contexts, libraries and other processes\n", human_bytes(memory.device_own),
        human_bytes(memory.device_others));
  }
}

ExitCode code_of(const RowCounts& counts) { return counts.non_finite == 0 ? ExitCode::passed : ExitCode::check_failed; }

/// The whole batch at once. Collective.
ExitCode run_whole(const Invocation& invocation, const ResolvedConfig& resolved, BatchParts& parts, const std::string& settings,
                   const Progress& progress) {
  Session& session = parts.session(0);
  const Communicator& comm = session.comm();
  const std::string& output = resolved.config.output;
  const std::unique_ptr<ResultFile> file = create_result(resolved, comm);
  const Pass pass = pass_over(session, progress, "");
  const RowCounts& counts = pass.report.counts;
  const ServiceReport services = parts.services();
  const std::string hosts = host_lines(comm, session.kernel().describe());
  if (!output.empty()) {
    progress.show("writing " + output);
    auto entries = result_provenance(invocation, session, settings, hosts);
    add_services(entries, session, services);
    write_result(session, file.get(), pass.report.timings, counts, entries);
    progress.show("");
  }
  if (comm.rank() != 0) { return code_of(counts); }
  if (counts.non_finite > 0) { print_error(line_of(counts)); }
  if (invocation.json) {
    Json json = json_of_setup(session);
    json["total_ms"] = pass.report.ms;
    json["tflops"] = pass.report.tflops;
    json["bytes_received"] = pass.received;
    if (resolved.config.gradients) { json["backward_ms"] = pass.backward_ms; }
    if (resolved.layer) {
      json["layer"] = to_json(*resolved.config.layer);
      json["layer"]["flops"] = pass.layer_flops;
      json["layer"]["project_ms"] = pass.layer_ms.project;
      json["layer"]["finish_ms"] = pass.layer_ms.finish;
    }
    add_counts(json, counts);
    add_services(json, services);
    json["timings"] = to_json(pass.report.timings);
    json["output"] = output;
    say("{}\n", json.dump(2));
    return code_of(counts);
  }
  print_setup(session);
  print_timings(pass.report.timings);
  if (resolved.layer) {
    say("layer: {:.3f} ms for q, k and v, {:.3f} ms for y (slowest rank), {:.4g} GFLOP over all ranks\n", pass.layer_ms.project,
        pass.layer_ms.finish, pass.layer_flops / 1e9);
  }
  if (resolved.config.gradients) { say("backward pass: {:.3f} ms of it (slowest rank)\n", pass.backward_ms); }
  say("time {:.3f} ms (slowest rank), {:.4g} TFLOP/s over all ranks{}\n", pass.report.ms, pass.report.tflops,
      resolved.config.share_gpu ? "; ranks share a GPU, so times mean nothing" : "");
  say("received {} bytes, as planned; rows that see no key: {} (batch, head, row)\n", pass.received, counts.uncovered);
  print_counts(counts);
  print_memory(services);
  if (!output.empty()) { say("wrote {}\n", output); }
  return code_of(counts);
}

/// "part 2 of 5, batch entries 4 to 7"
std::string name_of_part(const BatchParts& parts, std::int64_t index) {
  const GridCell part = parts.part(index);
  return fmt::format("part {} of {}, batch entries {} to {}", index + 1, parts.count(), part.first_batch,
                     part.first_batch + part.problem.batch - 1);
}

/// The batch in parts, but for those that an earlier run has done. Collective.
ExitCode run_in_parts(const Invocation& invocation, const ResolvedConfig& resolved, BatchParts& parts, const EarlierRun& earlier,
                      const std::string& settings, const Progress& progress, StopRequest& stop) {
  Session& first = parts.session(0);
  const Communicator& comm = first.comm();
  const std::string& output = resolved.config.output;
  const Json setup = json_of_setup(first);
  if (comm.rank() == 0 && !invocation.json) { print_setup(first); }
  std::unique_ptr<ResumableResult> result;
  if (!output.empty()) {
    const std::string hosts = host_lines(comm, first.kernel().describe());
    result = std::make_unique<ResumableResult>(resolved, parts, earlier, comm, result_provenance(invocation, first, settings, hosts));
    if (result->parts_complete() > 0 && comm.rank() == 0) {
      print_error(
          fmt::format("{} of {} parts are in '{}' already", result->parts_complete(), parts.count(), unfinished_result_path(output)));
    }
  }
  // From here on a signal costs what the present part has done, and no more.
  stop.heed_signals();
  Json rows = Json::array();
  std::vector<std::pair<RowCounts, std::int64_t>> counts;
  ServiceReport services;
  std::int64_t done = 0;
  double ms = 0;
  double flops = 0;
  for (std::int64_t index = 0; index < parts.count(); ++index) {
    if (result && result->is_complete(index)) {
      ++done;
      continue;
    }
    if (stop.agreed(comm)) { continue; }
    Session& session = parts.session(index);
    Pass pass = pass_over(session, progress, ": " + name_of_part(parts, index));
    pass.report.services = parts.services();
    if (result) { result->write(session, index, pass.report); }
    ++done;
    counts.emplace_back(pass.report.counts, parts.part(index).problem.batch);
    ms += pass.report.ms;
    flops += pass.flops;
    if (pass.report.services.high_water >= services.high_water) { services = pass.report.services; }
    if (comm.rank() != 0) { continue; }
    print_error(fmt::format("{}: {:.3f} ms, {:.4g} TFLOP/s", name_of_part(parts, index), pass.report.ms, pass.report.tflops));
    const GridCell part = parts.part(index);
    rows.push_back({{"part", index},
                    {"first_entry", part.first_batch},
                    {"entries", part.problem.batch},
                    {"total_ms", pass.report.ms},
                    {"tflops", pass.report.tflops},
                    {"backward_ms", pass.backward_ms},
                    {"timings", to_json(pass.report.timings)}});
  }
  const bool complete = done == parts.count();
  RowCounts total;
  if (complete && result) {
    total = result->counts();
    result->commit(total);
  } else if (!counts.empty()) {
    total = sum_of(counts);
  }
  const ExitCode code = complete ? code_of(total) : ExitCode::stopped;
  if (comm.rank() != 0) { return code; }
  if (total.non_finite > 0) { print_error(line_of(total)); }
  const std::string goes_on = complete ? std::string()
                              : result ? fmt::format("; --resume goes on with '{}'", unfinished_result_path(output))
                                       : "; without --output there is nothing to go on with";
  if (!complete) { print_error(stopped_line(stop, done, parts.count(), "part") + goes_on); }
  if (invocation.json) {
    Json json = setup;
    json["parts"] = parts.count();
    json["parts_complete"] = done;
    json["total_ms"] = ms;
    if (ms > 0) { json["tflops"] = flops / ms / 1e9; }
    add_counts(json, total);
    add_services(json, services);
    json["rows"] = std::move(rows);
    json["output"] = complete ? output : std::string();
    if (!complete) { json["stopped"] = stopped_line(stop, done, parts.count(), "part"); }
    say("{}\n", json.dump(2));
    return code;
  }
  if (ms > 0) {
    say("time {:.3f} ms for {} of {} parts (slowest ranks), {:.4g} TFLOP/s over all ranks{}\n", ms, counts.size(), parts.count(),
        flops / ms / 1e9, resolved.config.share_gpu ? "; ranks share a GPU, so times mean nothing" : "");
    print_memory(services);
  }
  say("rows that see no key: {} (batch, head, row){}\n", total.uncovered, complete ? "" : " so far");
  print_counts(total);
  if (complete && result) { say("wrote {}\n", output); }
  return code;
}

}  // namespace

ExitCode execute_run(const Invocation& invocation, const Communicator& comm, StopRequest& stop) {
  const Progress progress(comm.rank() == 0 && !invocation.json);
  const ResolvedConfig resolved = resolve(invocation.config, comm);
  const Config& config = resolved.config;
  std::string settings;
  EarlierRun earlier;
  if (config.resume) {
    settings = settings_of(resolved, comm);
    earlier = find_earlier_run(resolved, settings, comm);
    if (earlier.complete) {
      if (comm.rank() == 0) { print_error(fmt::format("'{}' is complete already", config.output)); }
      return ExitCode::passed;
    }
  } else {
    together(comm, [&] {
      if (comm.rank() == 0 && !config.output.empty()) { check_result_path(config.output, config.force); }
    });
  }
  BatchParts parts(resolved, comm, earlier.parts);
  if (parts.count() == 1 && earlier.parts == 0) { return run_whole(invocation, resolved, parts, settings, progress); }
  if (settings.empty()) { settings = settings_of(resolved, comm); }
  return run_in_parts(invocation, resolved, parts, earlier, settings, progress, stop);
}

}  // namespace annulus::app
