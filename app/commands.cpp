// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

#include <annulus/attention/session.hpp>
#include <annulus/backend/cuda_devices.hpp>
#include <annulus/bench/bench.hpp>
#include <annulus/core/build_info.hpp>
#include <annulus/core/provenance.hpp>
#include <annulus/io/result_file.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/verify/check.hpp>

#include "config_file.hpp"
#include "progress.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cmath>
#include <ctime>
#include <sys/utsname.h>
#include <unistd.h>

namespace annulus::app {

namespace {

using Json = nlohmann::ordered_json;

std::string human_bytes(std::int64_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < std::size(kUnits)) {
    value /= 1024.0;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.2f} {}", value, kUnits[unit]);
}

std::string describe(const Problem& problem) {
  return fmt::format("batch {}, seq-len {}, heads {}, kv-heads {}, head-dim {}, {}{}, scale {:.6g}", problem.batch, problem.seq_len,
                     problem.heads, problem.kv_heads, problem.head_dim, to_string(problem.dtype), problem.causal ? ", causal" : "",
                     problem.scale);
}

std::string describe(const Pattern& pattern) {
  std::string lengths;
  std::string rates;
  for (const Branch& branch : pattern.branches) {
    lengths += fmt::format("{}{}", lengths.empty() ? "" : ",", branch.segment_length);
    rates += fmt::format("{}{}", rates.empty() ? "" : ",", branch.dilation_rate);
  }
  return fmt::format("segments {}, rates {}, offset {}, head-split {}, mixing {}{}", lengths, rates, to_string(pattern.offset),
                     to_string(pattern.head_split), to_string(pattern.mixing), pattern.scale_by_branches ? ", scaled by branches" : "");
}

Json to_json(const Problem& problem) {
  return {{"batch", problem.batch},       {"seq-len", problem.seq_len},        {"heads", problem.heads},   {"kv-heads", problem.kv_heads},
          {"head-dim", problem.head_dim}, {"dtype", to_string(problem.dtype)}, {"causal", problem.causal}, {"scale", problem.scale}};
}

Json to_json(const CaseReport& report) {
  Json json{{"name", report.name}, {"passed", report.verdict.passed}};
  json["rows"] = report.rows_checked;
  json["rms_error"] = report.verdict.rms_error;
  json["plain_rms_error"] = report.verdict.plain_rms_error;
  json["ratio"] = report.verdict.ratio;
  json["limit"] = report.verdict.limit;
  json["max_error"] = report.sums.max_error;
  json["worst"] = report.sums.worst;
  json["max_lse_error"] = report.sums.max_lse_error;
  json["uncovered"] = report.sums.uncovered;
  if (!report.flags.empty()) { json["flags"] = report.flags; }
  if (!report.verdict.passed) { json["reason"] = report.verdict.reason; }
  return json;
}

std::string line_of(const CaseReport& report) {
  const Verdict& verdict = report.verdict;
  return fmt::format("{} {} | rows {}/{} | rms {:.2e} (limit {:.2e}, {:.2f} x plain) | max {:.2e} at [{},{},{},{}] | lse {:.1e}{}",
                     verdict.passed ? "PASS" : "FAIL", report.name, report.rows_checked, report.rows_total, verdict.rms_error,
                     verdict.limit, verdict.ratio, report.sums.max_error, report.sums.worst[0], report.sums.worst[1], report.sums.worst[2],
                     report.sums.worst[3], report.sums.max_lse_error,
                     verdict.passed ? "" : "\n     " + verdict.reason + "\n     " + report.flags);
}

std::string setup_line(const Session& session) {
  return fmt::format("{} rank{} over {}, schedule {}, backend {}", session.ranks(), session.ranks() == 1 ? "" : "s",
                     to_string(session.transport_kind()), to_string(session.resolved().config.schedule), session.backend().describe());
}

/// (batch, head, row) triples that no branch covers, over all ranks. Collective.
std::int64_t count_uncovered(const Session& session) {
  std::int64_t uncovered = 0;
  const Problem& problem = session.problem();
  std::vector<float> lse;
  constexpr std::int64_t kRows = 4096;
  for (const auto& executor : session.executors()) {
    for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
      for (std::int64_t first = 0; first < executor->plan().local_rows; first += kRows) {
        const std::int64_t count = std::min(kRows, executor->plan().local_rows - first);
        lse.resize(static_cast<std::size_t>(problem.heads * count));
        executor->read_lse(batch, first, count, lse.data());
        uncovered += std::count(lse.begin(), lse.end(), -std::numeric_limits<float>::infinity());
      }
    }
  }
  return session.comm().sum(uncovered);
}

std::vector<std::pair<std::string, std::string>> provenance(const Invocation& invocation, const Session& session,
                                                            const std::string& hosts) {
  const BuildInfo& build = build_info();
  std::vector<std::pair<std::string, std::string>> entries;
  entries.emplace_back("config", to_toml(session.resolved().config));
  entries.emplace_back("command_line", invocation.command_line);
  entries.emplace_back("written", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))));
  entries.emplace_back("version", std::string(build.version));
  entries.emplace_back("git", std::string(build.git));
  entries.emplace_back("compiler", fmt::format("{} {}", build.compiler, build.build_type));
  entries.emplace_back("mpi", mpi_library_version());
  entries.emplace_back("hdf5", std::string(build.hdf5));
  if (!build.cuda.empty()) { entries.emplace_back("cuda", std::string(build.cuda)); }
  if (!build.nccl.empty()) { entries.emplace_back("nccl", std::string(build.nccl)); }
  entries.emplace_back("backend", session.backend().describe());
  entries.emplace_back("transport", std::string(to_string(session.transport_kind())));
  entries.emplace_back("ranks", std::to_string(session.ranks()));
  entries.emplace_back("input", session.resolved().source->describe());
  entries.emplace_back("hosts", hosts);
  if (session.resolved().config.share_gpu) { entries.emplace_back("timings", "meaningless: ranks share a GPU"); }
  std::string environment;
  for (const auto& [name, value] : recorded_environment()) { environment += name + "=" + value + "\n"; }
  entries.emplace_back("environment", environment);
  return entries;
}

/// "rank 0: host cpu-or-gpu" for every rank. Collective.
std::string host_map(const Session& session) {
  std::string text;
  const std::vector<std::string> all = session.comm().all_gather(fmt::format("{} {}", session.comm().name(), session.backend().describe()));
  for (const std::string& line : all) { text += line + "\n"; }
  return text;
}

void print_timings(const std::vector<std::vector<StepTiming>>& timings) {
  fmt::print("{:>5} {:>5} {:>12} {:>12} {:>12} {:>14} {:>14}\n", "rank", "step", "compute ms", "comm ms", "exposed ms", "sent B",
             "received B");
  constexpr std::size_t kLines = 32;
  std::size_t lines = 0;
  for (std::size_t rank = 0; rank < timings.size(); ++rank) {
    for (std::size_t step = 0; step < timings[rank].size(); ++step) {
      if (lines++ >= kLines) { continue; }
      const StepTiming& t = timings[rank][step];
      fmt::print("{:>5} {:>5} {:>12.3f} {:>12.3f} {:>12.3f} {:>14} {:>14}\n", rank, step, t.compute_ms, t.communication_ms, t.exposed_ms,
                 t.bytes_sent, t.bytes_received);
    }
  }
  if (lines > kLines) { fmt::print("  ... {} more lines; the result file and --json have all of them\n", lines - kLines); }
}

Json to_json(const std::vector<std::vector<StepTiming>>& timings) {
  Json ranks = Json::array();
  for (const auto& steps : timings) {
    Json list = Json::array();
    for (const StepTiming& t : steps) {
      list.push_back({{"compute_ms", t.compute_ms},
                      {"communication_ms", t.communication_ms},
                      {"exposed_ms", t.exposed_ms},
                      {"bytes_sent", t.bytes_sent},
                      {"bytes_received", t.bytes_received}});
    }
    ranks.push_back(std::move(list));
  }
  return ranks;
}

ExitCode execute_run(const Invocation& invocation, const Communicator& comm) {
  const Progress progress(comm.rank() == 0 && !invocation.json);
  const ResolvedConfig resolved = resolve(invocation.config, comm);
  Session session(resolved, comm);
  progress.show("reading input");
  session.load();
  progress.show("attending");
  session.run();
  progress.show("");
  const double ms = session.slowest_ms();
  const std::vector<std::vector<StepTiming>> timings = session.gather_timings();
  std::int64_t pairs = 0;
  std::int64_t received = 0;
  for (const auto& executor : session.executors()) {
    const PlanCost cost = plan_cost(executor->plan());
    pairs += cost.pairs;
    received += cost.bytes_received;
  }
  const double flops = 4.0 * static_cast<double>(session.problem().head_dim) * static_cast<double>(comm.sum(pairs));
  received = comm.sum(received);
  const std::int64_t uncovered = count_uncovered(session);
  const std::int64_t high_water = comm.max(session.backend().memory().high_water);
  const std::int64_t predicted = comm.max(session.predicted_bytes());
  const std::string hosts = host_map(session);
  const std::string& output = resolved.config.output;
  if (!output.empty()) {
    progress.show("writing " + output);
    write_result(session, output, resolved.config.force, timings, provenance(invocation, session, hosts));
    progress.show("");
  }
  if (comm.rank() != 0) { return ExitCode::passed; }
  if (invocation.json) {
    Json json{{"problem", to_json(session.problem())}, {"pattern", describe(session.pattern())}, {"setup", setup_line(session)}};
    json["total_ms"] = ms;
    json["tflops"] = flops / ms / 1e9;
    json["bytes_received"] = received;
    json["uncovered"] = uncovered;
    json["memory"] = {{"high_water", high_water}, {"planned", predicted}};
    json["timings"] = to_json(timings);
    json["output"] = output;
    fmt::print("{}\n", json.dump(2));
    return ExitCode::passed;
  }
  fmt::print("{}\n{}\n{}\n", describe(session.problem()), describe(session.pattern()), setup_line(session));
  print_timings(timings);
  fmt::print("time {:.3f} ms (slowest rank), {:.4g} TFLOP/s over all ranks{}\n", ms, flops / ms / 1e9,
             resolved.config.share_gpu ? "; ranks share a GPU, so times mean nothing" : "");
  fmt::print("received {} bytes, as planned; rows that no branch covers: {} (batch, head, row)\n", received, uncovered);
  fmt::print("memory of the largest rank: {} at most, {} planned\n", human_bytes(high_water), human_bytes(predicted));
  if (!output.empty()) { fmt::print("wrote {}\n", output); }
  return ExitCode::passed;
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
      fmt::print("{}\n", line_of(report));
      if (many) { progress.show(fmt::format("{} of {} cases", done, invocation.config.cases)); }
    }
  });
  progress.show("");
  if (comm.rank() == 0) {
    if (invocation.json) {
      fmt::print("{}\n", Json{{"passed", passed}, {"cases", std::move(cases)}}.dump(2));
    } else if (many) {
      fmt::print("{} cases, {} failed (seed {})\n", done, failed, invocation.config.seed);
    }
  }
  return passed ? ExitCode::passed : ExitCode::check_failed;
}

ExitCode execute_bench(const Invocation& invocation, const Communicator& comm) {
  const BenchReport report = bench(invocation.config, comm);
  if (comm.rank() != 0) { return ExitCode::passed; }
  double exposed = 0;
  double communication = 0;
  for (const auto& steps : report.timings) {
    double rank_exposed = 0;
    double rank_communication = 0;
    for (const StepTiming& t : steps) {
      rank_exposed += t.exposed_ms;
      rank_communication += t.communication_ms;
    }
    exposed = std::max(exposed, rank_exposed);
    communication = std::max(communication, rank_communication);
  }
  if (invocation.json) {
    Json json{{"median_ms", report.median_ms}, {"min_ms", report.min_ms}, {"p95_ms", report.p95_ms}, {"repetitions", report.repetitions}};
    json["tflops_per_rank"] = report.tflops_per_rank;
    json["communication_ms"] = communication;
    json["exposed_ms"] = exposed;
    json["bytes_received"] = report.bytes_received;
    json["blocks_alone_ms"] = report.blocks_alone_ms;
    json["overlap_efficiency"] = report.overlap_efficiency;
    json["fma_peak_gflops"] = report.peak_gflops;
    json["of_peak"] = report.of_peak;
    json["check"] = to_json(report.check);
    json["timings"] = to_json(report.timings);
    json["config"] = to_toml(invocation.config);
    fmt::print("{}\n", json.dump(2));
    return ExitCode::passed;
  }
  fmt::print("# {}\n", line_of(report.check));
  fmt::print("# times in ms of the slowest rank, median of {}; flops = 4 x head-dim x visible (query, key) pairs\n", report.repetitions);
  fmt::print("{:>9} {:>6} {:>6} {:>5} {:>10} {:>10} {:>10} {:>12} {:>10} {:>10} {:>14} {:>8}\n", "seq-len", "heads", "h-dim", "dtype",
             "median", "min", "p95", "TFLOP/s/rank", "comm", "exposed", "received B", "overlap");
  const Problem& problem = invocation.config.problem;
  fmt::print("{:>9} {:>6} {:>6} {:>5} {:>10.3f} {:>10.3f} {:>10.3f} {:>12.4f} {:>10.3f} {:>10.3f} {:>14} {:>8}\n", problem.seq_len,
             problem.heads, problem.head_dim, to_string(invocation.config.dtype.value_or(problem.dtype)), report.median_ms, report.min_ms,
             report.p95_ms, report.tflops_per_rank, communication, exposed, report.bytes_received,
             report.overlap_efficiency > 0 ? fmt::format("{:.3f}", report.overlap_efficiency) : std::string("-"));
  if (report.peak_gflops > 0) {
    fmt::print("# {:.3f} of the fp32 FMA peak of each rank's threads ({:.0f} GFLOP/s in this run)\n", report.of_peak, report.peak_gflops);
  }
  return ExitCode::passed;
}

ExitCode execute_plan(const Invocation& invocation) {
  const Config config = resolve_without_input(invocation.config);
  const std::int64_t ranks = config.ranks > 0 ? config.ranks : config.virtual_ranks;
  const Partition partition(config.partition, config.problem.seq_len, ranks);
  const std::int64_t accumulator = config.backend == BackendKind::reference ? 8 : 4;
  constexpr std::int64_t kLines = 16;
  Json json{{"problem", to_json(config.problem)}, {"pattern", describe(config.pattern)}, {"ranks", ranks}};
  Json list = Json::array();
  if (!invocation.json) {
    fmt::print("{}\n{}\n{} ranks, partition {}, schedule {}\n", describe(config.problem), describe(config.pattern), ranks,
               to_string(config.partition), to_string(config.schedule));
    fmt::print("{:>6} {:>10} {:>6} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>6} {:>10}\n", "rank", "rows", "steps", "memory",
               "inputs+out", "partials", "slots", "sent B", "received B", "peers", "GFLOP");
  }
  std::int64_t bytes = 0;
  std::int64_t largest = 0;
  double flops = 0;
  std::int64_t busiest_link = 0;
  for (std::int64_t rank = 0; rank < ranks; ++rank) {
    const RingPlan plan = make_plan(config.problem, config.pattern, partition, config.schedule, rank);
    const PlanCost cost = plan_cost(plan);
    const MemoryPlan memory = plan_memory(plan, accumulator);
    bytes += cost.bytes_sent;
    flops += cost.flops;
    largest = std::max(largest, memory.total());
    for (const LinkBytes& link : cost.links) { busiest_link = std::max(busiest_link, link.sent); }
    if (invocation.json) {
      Json links = Json::array();
      for (const LinkBytes& link : cost.links) { links.push_back({{"peer", link.peer}, {"sent", link.sent}, {"received", link.received}}); }
      list.push_back({{"rank", rank},
                      {"rows", plan.local_rows},
                      {"steps", cost.steps},
                      {"memory", memory.total()},
                      {"bytes_sent", cost.bytes_sent},
                      {"bytes_received", cost.bytes_received},
                      {"flops", cost.flops},
                      {"links", std::move(links)}});
    } else if (rank < kLines) {
      fmt::print("{:>6} {:>10} {:>6} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>6} {:>10.3f}\n", rank, plan.local_rows, cost.steps,
                 human_bytes(memory.total()), human_bytes(memory.inputs + memory.outputs), human_bytes(memory.partials),
                 human_bytes(memory.slots), cost.bytes_sent, cost.bytes_received, cost.links.size(), cost.flops / 1e9);
    }
  }
  if (invocation.json) {
    json["bytes_sent"] = bytes;
    json["flops"] = flops;
    json["largest_memory"] = largest;
    json["per_rank"] = std::move(list);
    fmt::print("{}\n", json.dump(2));
    return ExitCode::passed;
  }
  if (ranks > kLines) { fmt::print("   ... {} more ranks; --json has all of them\n", ranks - kLines); }
  fmt::print("all ranks: {} bytes sent, at most {} over one link; {:.4g} GFLOP; largest memory {} (without the backend's workspace)\n",
             bytes, busiest_link, flops / 1e9, human_bytes(largest));
  return ExitCode::passed;
}

ExitCode execute_info(const Invocation& invocation, const Communicator& comm) {
  const BuildInfo& build = build_info();
  const std::vector<GpuInfo> gpus = visible_gpus();
  std::string mine = fmt::format("{}", comm.host());
  for (const GpuInfo& gpu : gpus) { mine += fmt::format("; {} {}", gpu.name, gpu.uuid); }
  const std::vector<std::string> map = comm.all_gather(mine);
  if (comm.rank() != 0) { return ExitCode::passed; }
  std::vector<std::string> backends{"reference", "cpu"};
  std::vector<std::string> transports{"self", "loopback", "mpi"};
  if (!build.cuda.empty()) {
    backends.emplace_back("cuda");
    transports.emplace_back("p2p");
  }
  if (!build.nccl.empty()) { transports.emplace_back("nccl"); }
  if (invocation.json) {
    Json json{{"version", build.version},
              {"git", build.git},
              {"compiler", build.compiler},
              {"build_type", build.build_type},
              {"cpu_gemm", build.cpu_gemm}};
    json["mpi"] = mpi_library_version();
    json["hdf5"] = build.hdf5;
    json["cuda"] = build.cuda;
    json["nccl"] = build.nccl;
    json["backends"] = backends;
    json["transports"] = transports;
    json["ranks"] = map;
    fmt::print("{}\n", json.dump(2));
    return ExitCode::passed;
  }
  fmt::print("annulus {} ({}), {} {}\n", build.version, build.git, build.compiler, build.build_type);
  fmt::print("mpi         {}\nhdf5        {}{}\n", mpi_library_version(), build.hdf5, build.hdf5_parallel ? " (parallel)" : " (serial)");
  fmt::print("cuda        {}\n", build.cuda.empty() ? std::string("not compiled") : fmt::format("{} for {}", build.cuda, build.cuda_archs));
  fmt::print("nccl        {}\n", build.nccl.empty() ? std::string_view("not compiled") : build.nccl);
  fmt::print("backends    {}\ntransports  {}\n", fmt::join(backends, ", "), fmt::join(transports, ", "));
  fmt::print("kernels     cpu: products by {}{}; dtypes {}; head dims 1 to {}\n", build.cpu_gemm,
             build.cuda.empty() ? "" : "; cuda: cublas", names_of<DType>(), kMaxHeadDim);
  for (std::size_t rank = 0; rank < map.size(); ++rank) { fmt::print("rank {:<6} {}\n", rank, map[rank]); }
  return ExitCode::passed;
}

ExitCode execute_generate(const Invocation& invocation) {
  Config config = resolve_without_input(invocation.config);
  ANNULUS_EXPECTS(!config.output.empty(), "generate needs --output, the file to write");
  write_generated_input(config.output, config.force, config.problem, config.seed);
  fmt::print("wrote {}: {}, seed {}\n", config.output, describe(config.problem), config.seed);
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
