// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

#include <annulus/attention/attention_kernel.hpp>
#include <annulus/core/thread_stacks.hpp>
#include <annulus/io/result_file.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/key_order.hpp>
#include <annulus/session/check.hpp>
#include <annulus/session/result_sink.hpp>
#include <annulus/session/session.hpp>

#include "bench.hpp"
#include "info.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "standard_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <memory>

namespace annulus::app {

namespace {

std::string setup_line(const Session& session) {
  return fmt::format("{} rank{} over {}, schedule {}, backend {}", session.ranks(), session.ranks() == 1 ? "" : "s",
                     to_string(session.transport_kind()), to_string(session.resolved().config.schedule), session.backend().describe());
}

std::string key_order_line(const Session& session) {
  const Config& config = session.resolved().config;
  const Partition partition(config.partition, config.problem.seq_len, session.ranks());
  return describe_key_order(config.problem, config.pattern, partition, routing_of(config));
}

std::vector<std::pair<std::string, std::string>> result_provenance(const Invocation& invocation, const Session& session,
                                                                   const std::string& hosts) {
  auto entries = provenance(invocation, session.resolved().config);
  entries.emplace_back("key_order", key_order_line(session));
  entries.emplace_back("backend", session.backend().describe());
  entries.emplace_back("transport", std::string(to_string(session.transport_kind())));
  entries.emplace_back("ranks", std::to_string(session.ranks()));
  entries.emplace_back("input", session.resolved().source->describe());
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
  std::int64_t received = 0;
  for (const auto& executor : session.executors()) {
    const PlanCost cost = plan_cost(executor->plan());
    flops += cost.flops;
    received += static_cast<std::int64_t>(cost.bytes_received);  // of memory that is there
  }
  flops = comm.sum(flops);
  received = comm.sum(received);
  const RowCounts counts = count_rows(session);
  const ExitCode code = counts.non_finite == 0 ? ExitCode::passed : ExitCode::check_failed;
  const MemoryReport memory = session.backend().memory();
  const std::int64_t high_water = comm.max(memory.high_water);
  const std::int64_t device_own = comm.max(memory.device_own);
  const std::int64_t device_others = comm.max(memory.device_others);
  const std::int64_t predicted = comm.max(session.predicted_bytes());
  const std::string hosts = host_lines(comm, session.backend().describe());
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
    json["key_order"] = key_order_line(session);
    json["total_ms"] = ms;
    json["tflops"] = flops / ms / 1e9;
    json["bytes_received"] = received;
    json["uncovered"] = counts.uncovered;
    json["non_finite"] = counts.non_finite;
    if (counts.non_finite > 0) { json["first_non_finite"] = counts.first_non_finite; }
    json["memory"] = {{"high_water", high_water}, {"planned", predicted}, {"device_own", device_own}, {"device_others", device_others}};
    json["timings"] = to_json(timings);
    json["output"] = output;
    say("{}\n", json.dump(2));
    return code;
  }
  say("{}\n{}\n{}\n{}\n", describe(session.problem()), describe(session.pattern()), setup_line(session), key_order_line(session));
  print_timings(timings);
  say("time {:.3f} ms (slowest rank), {:.4g} TFLOP/s over all ranks{}\n", ms, flops / ms / 1e9,
      resolved.config.share_gpu ? "; ranks share a GPU, so times mean nothing" : "");
  say("received {} bytes, as planned; rows that no branch covers: {} (batch, head, row)\n", received, counts.uncovered);
  if (counts.non_finite > 0) { say("{}\n", line_of(counts)); }
  say("memory of the largest rank: {} at most, {} planned\n", human_bytes(high_water), human_bytes(predicted));
  if (device_own > 0) {
    say("of the GPU's memory: {} taken for it, {} by contexts, libraries and other processes\n", human_bytes(device_own),
        human_bytes(device_others));
  }
  if (!output.empty()) { say("wrote {}\n", output); }
  return code;
}

ExitCode execute_check(const Invocation& invocation, const Communicator& comm) {
  const Progress progress(comm.rank() == 0 && !invocation.json);
  Json cases = Json::array();
  std::int64_t done = 0;
  std::int64_t failed = 0;
  const bool many = invocation.config.cases > 0;
  const bool passed = check(invocation.config, comm, [&](const CaseReport& report) {
    ++done;
    failed += report.verdict.passed ? 0 : 1;
    if (comm.rank() != 0) { return; }
    progress.show("");
    if (invocation.json) {
      cases.push_back(to_json(report));
    } else {
      say("{}\n", line_of(report));
      if (many) { progress.show(fmt::format("{} of {} cases", done, invocation.config.cases)); }
    }
  });
  progress.show("");
  if (comm.rank() == 0) {
    if (invocation.json) {
      say("{}\n", Json{{"passed", passed}, {"cases", std::move(cases)}}.dump(2));
    } else if (many) {
      say("{} cases, {} failed (seed {})\n", done, failed, invocation.config.seed);
    }
  }
  return passed ? ExitCode::passed : ExitCode::check_failed;
}

/// ", kernel K" of a resolved configuration, where the backend has several.
std::string kernel_text(const Config& config) {
  return config.kernel == KernelKind::automatic ? std::string() : fmt::format(", kernel {}", to_string(config.kernel));
}

/// What the kernel of the configuration takes on a rank.
Int128 partial_bytes(const Config& config, const Partition& partition, const PlanSizes& sizes) {
  switch (config.kernel) {
    case KernelKind::fused:
      // Its partials are of the rows that it carries from step to step, which only the plan tells.
      return kernel_bytes(config.kernel, make_plan(config.problem, config.pattern, partition, routing_of(config), sizes.rank), 4);
    case KernelKind::automatic:
    case KernelKind::cublas:
      break;
  }
  return whole_partials_bytes(config.problem, sizes, config.backend == BackendKind::reference ? 8 : 4);
}

ExitCode execute_plan(const Invocation& invocation) {
  const Config config = resolve_without_input(invocation.config);
  const std::int64_t ranks = config.ranks > 0 ? config.ranks : config.virtual_ranks;
  const Partition partition(config.partition, config.problem.seq_len, ranks);
  constexpr std::int64_t kLines = 16;
  Json json{{"problem", to_json(config.problem)}, {"pattern", describe(config.pattern)}, {"ranks", ranks}};
  json["backend"] = fmt::format("{}{}", to_string(config.backend), kernel_text(config));
  json["key_order"] = describe_key_order(config.problem, config.pattern, partition, routing_of(config));
  Json list = Json::array();
  if (!invocation.json) {
    say("{}\n{}\n{} ranks, partition {}, schedule {}, backend {}{}\n", describe(config.problem), describe(config.pattern), ranks,
        to_string(config.partition), to_string(config.schedule), to_string(config.backend), kernel_text(config));
    say("{}\n", describe_key_order(config.problem, config.pattern, partition, routing_of(config)));
    say("{:>6} {:>10} {:>6} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>6} {:>10}\n", "rank", "rows", "steps", "memory", "inputs+out",
        "partials", "slots", "sent B", "received B", "peers", "GFLOP");
  }
  Int128 bytes = 0;
  std::int64_t largest = 0;
  double flops = 0;
  Int128 busiest_link = 0;
  for (const auto& [sizes, cost] : figures_of_ranks(config.problem, config.pattern, partition, routing_of(config))) {
    const std::int64_t rank = sizes.rank;
    const MemoryPlan memory = plan_memory(config.problem, sizes, partial_bytes(config, partition, sizes));
    bytes += cost.bytes_sent;
    flops += cost.flops;
    largest = std::max(largest, memory.total());
    for (const LinkBytes& link : cost.links) { busiest_link = std::max(busiest_link, link.sent); }
    if (invocation.json) {
      Json links = Json::array();
      for (const LinkBytes& link : cost.links) {
        links.push_back({{"peer", link.peer}, {"sent", count_in_json(link.sent)}, {"received", count_in_json(link.received)}});
      }
      list.push_back({{"rank", rank},
                      {"rows", sizes.local_rows},
                      {"steps", cost.steps},
                      {"memory", memory.total()},
                      {"bytes_sent", count_in_json(cost.bytes_sent)},
                      {"bytes_received", count_in_json(cost.bytes_received)},
                      {"flops", cost.flops},
                      {"links", std::move(links)}});
    } else if (rank < kLines) {
      say("{:>6} {:>10} {:>6} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>6} {:>10.3f}\n", rank, sizes.local_rows, cost.steps,
          human_bytes(memory.total()), human_bytes(memory.inputs + memory.outputs), human_bytes(memory.partials), human_bytes(memory.slots),
          cost.bytes_sent, cost.bytes_received, cost.links.size(), cost.flops / 1e9);
    }
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
  say("all ranks: {} bytes sent, at most {} over one link; {:.4g} GFLOP; largest memory {} (without the backend's workspace)\n", bytes,
      busiest_link, flops / 1e9, human_bytes(largest));
  return ExitCode::passed;
}

ExitCode execute_generate(const Invocation& invocation) {
  Config config = resolve_without_input(invocation.config);
  ANNULUS_EXPECTS(!config.output.empty(), "generate needs --output, the file to write");
  const std::int64_t threads = config.threads > 0 ? config.threads : default_threads(Communicator::single());
  require_thread_stacks(checked_narrow<int>(threads));
  write_generated_input(config.output, config.force, config.problem, config.seed, checked_narrow<int>(threads));
  say("wrote {}: {}, seed {}\n", config.output, describe(config.problem), config.seed);
  return ExitCode::passed;
}

}  // namespace

ExitCode execute(const Invocation& invocation, const Communicator& comm) {
  switch (invocation.command) {
    case Command::run:
      return execute_run(invocation, comm);
    case Command::check:
      return execute_check(invocation, comm);
    case Command::bench:
      return execute_bench(invocation, comm);
    case Command::info:
      return execute_info(invocation, comm);
    case Command::plan:
    case Command::generate:
      break;
  }
  // These two are one process's work; under a launcher rank 0 does it and the others wait for its verdict.
  ExitCode code = ExitCode::passed;
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    code = invocation.command == Command::plan ? execute_plan(invocation) : execute_generate(invocation);
  });
  return code;
}

}  // namespace annulus::app
