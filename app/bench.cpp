// SPDX-License-Identifier: Apache-2.0
#include "bench.hpp"

#include <annulus/bench/bench.hpp>
#include <annulus/bench/bench_file.hpp>

#include "config_file.hpp"
#include "progress.hpp"
#include "report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <string_view>
#include <system_error>

namespace annulus::app {

namespace {

/// Runs `body` for one row; what it throws names the row, where there are several.
template <class Body>
void with_row(const Invocation& invocation, std::size_t index, Body&& body) {
  const BenchRow& row = invocation.rows[index];
  const auto named = [&](const Error& error) {
    if (invocation.config.sweep.empty()) { return std::string(error.what()); }
    return fmt::format("row {} of {} ({}): {}", index + 1, invocation.rows.size(), describe_swept(row), error.what());
  };
  try {
    std::forward<Body>(body)(row);
  } catch (const AgreedError& error) { throw AgreedError(error.code(), named(error), error.reporter()); } catch (const Error& error) {
    throw Error(error.code(), named(error));
  }
}

/// Everything that can be found wrong is found here, in all rows, before the first one runs. Collective.
void require_all_runnable(const Invocation& invocation, const Communicator& comm) {
  const Config& config = invocation.config;
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    std::error_code ignored;
    const bool both = !config.csv.empty() && !config.output.empty();
    ANNULUS_EXPECTS(
        !both || std::filesystem::weakly_canonical(config.csv, ignored) != std::filesystem::weakly_canonical(config.output, ignored),
        "--csv and --output are the same file, {}", config.csv);
    if (!config.csv.empty()) { check_result_path(config.csv, config.force); }
    if (!config.output.empty()) { check_result_path(config.output, config.force); }
  });
  if (invocation.rows.size() == 1) { return; }  // the row itself begins so
  const Progress progress(comm.rank() == 0 && !invocation.json);
  for (std::size_t index = 0; index < invocation.rows.size(); ++index) {
    progress.show(fmt::format("setting up row {} of {}", index + 1, invocation.rows.size()));
    with_row(invocation, index, [&](const BenchRow& row) { require_runnable(row.config, comm); });
  }
  progress.show("");
}

/// The columns that tell rows apart: those swept that the table has no column for.
std::vector<std::string_view> swept_columns(const BenchRow& row) {
  constexpr std::array<std::string_view, 6> kShown{"seq-len", "heads", "head-dim", "dtype", "causal", "virtual-ranks"};
  std::vector<std::string_view> names;
  for (const auto& [name, value] : row.swept) {
    if (std::find(kShown.begin(), kShown.end(), name) == kShown.end()) { names.push_back(name); }
  }
  return names;
}

class Table {
 public:
  explicit Table(const std::vector<BenchRow>& rows) {
    for (const std::string_view name : swept_columns(rows.front())) {
      std::size_t width = name.size();
      for (const BenchRow& row : rows) { width = std::max(width, value_of(row, name).size()); }
      swept_.emplace_back(name, width);
    }
  }

  void print_header(std::int64_t repetitions) const {
    fmt::print("# times in ms of the slowest rank, median of {}; flops = 4 x head-dim x visible (query, key) pairs\n", repetitions);
    fmt::print("# overlap: the same blocks without passing / median; of peak: of the fp32 FMA peak of a rank's threads;\n");
    fmt::print("# error: RMS error of the output that was timed / that of a plain run in the same dtype\n");
    for (const auto& [name, width] : swept_) { fmt::print("{:>{}} ", name, width); }
    fmt::print("{:>5} {:>9} {:>6} {:>6} {:>5} {:>6} {:>10} {:>10} {:>10} {:>12} {:>10} {:>10} {:>14} {:>8} {:>8} {:>6}\n", "ranks",
               "seq-len", "heads", "h-dim", "dtype", "causal", "median", "min", "p95", "TFLOP/s/rank", "comm", "exposed", "received B",
               "overlap", "of peak", "error");
    std::fflush(stdout);
  }

  void print(const BenchRow& row, const BenchReport& report) const {
    const auto or_dash = [](double value) { return value > 0 ? fmt::format("{:.3f}", value) : std::string("-"); };
    const Problem& problem = report.config.problem;
    for (const auto& [name, width] : swept_) { fmt::print("{:>{}} ", value_of(row, name), width); }
    fmt::print(
        "{:>5} {:>9} {:>6} {:>6} {:>5} {:>6} {:>10.3f} {:>10.3f} {:>10.3f} {:>12.4f} {:>10.3f} {:>10.3f} {:>14} {:>8} {:>8} {:>6.2f}\n",
        report.ranks, problem.seq_len, problem.heads, problem.head_dim, to_string(problem.dtype), problem.causal, report.median_ms,
        report.min_ms, report.p95_ms, report.tflops_per_rank, report.run.communication_ms, report.run.exposed_ms, report.bytes_received,
        or_dash(report.overlap_efficiency), or_dash(report.of_peak), report.check.verdict.ratio);
    std::fflush(stdout);
  }

 private:
  static std::string value_of(const BenchRow& row, std::string_view name) {
    for (const auto& [swept, value] : row.swept) {
      if (swept == name) { return text_of(value); }
    }
    return {};
  }

  std::vector<std::pair<std::string_view, std::size_t>> swept_;  ///< name and width
};

Json json_of(const BenchRow& row, const BenchReport& report) {
  Json json;
  Json swept = Json::object();
  for (const auto& [name, value] : row.swept) {
    std::visit([&, key = std::string(name)](const auto& held) { swept[key] = held; }, value);
  }
  json["swept"] = std::move(swept);
  json["problem"] = to_json(report.config.problem);
  json["pattern"] = describe(report.config.pattern);
  json["ranks"] = report.ranks;
  json["transport"] = to_string(report.config.transport);
  json["schedule"] = to_string(report.config.schedule);
  json["backend"] = report.backend;
  json["median_ms"] = report.median_ms;
  json["min_ms"] = report.min_ms;
  json["p95_ms"] = report.p95_ms;
  json["repetitions"] = report.samples_ms.size();
  json["samples_ms"] = report.samples_ms;
  json["tflops_per_rank"] = report.tflops_per_rank;
  json["communication_ms"] = report.run.communication_ms;
  json["exposed_ms"] = report.run.exposed_ms;
  json["skew_ms"] = report.run.skew_ms;
  json["bytes_received"] = report.bytes_received;
  json["blocks_alone_ms"] = report.blocks_alone_ms;
  json["overlap_efficiency"] = report.overlap_efficiency;
  json["fma_peak_gflops"] = report.peak_gflops;
  json["of_peak"] = report.of_peak;
  json["memory_high_water"] = report.memory_high_water;
  json["check"] = to_json(report.check);
  Json steps = Json::array();
  for (const StepSummary& step : report.steps) {
    steps.push_back({{"compute_ms", step.compute_ms},
                     {"skew_ms", step.skew_ms},
                     {"communication_ms", step.communication_ms},
                     {"exposed_ms", step.exposed_ms}});
  }
  json["steps"] = std::move(steps);
  json["timings"] = to_json(report.timings);
  json["config"] = to_toml(row.config);
  return json;
}

/// A column of one number or text of every report.
template <class Get>
BenchColumn column(std::string_view name, const std::vector<BenchReport>& reports, Get get) {
  std::vector<decltype(get(reports.front()))> values;
  for (const BenchReport& report : reports) { values.push_back(get(report)); }
  return {std::string(name), std::move(values)};
}

/// The options of problem, pattern and execution as the rows ran, named like the flags, then what was measured.
std::vector<BenchColumn> columns_of(const std::vector<BenchReport>& reports) {
  std::vector<BenchColumn> columns;
  for (const Option& option : options()) {
    if (option.group != "Problem" && option.group != "Pattern" && option.group != "Execution") { continue; }
    const auto value_of = [&option](const BenchReport& report) {
      Value value;
      option.get(report.config, value);
      return value;
    };
    if (option.kind == ValueKind::integer) {
      columns.push_back(column(option.name, reports, [&](const BenchReport& r) { return std::get<std::int64_t>(value_of(r)); }));
    } else if (option.kind == ValueKind::real) {
      columns.push_back(column(option.name, reports, [&](const BenchReport& r) { return std::get<double>(value_of(r)); }));
    } else {
      columns.push_back(column(option.name, reports, [&](const BenchReport& r) { return text_of(value_of(r)); }));
    }
  }
  const auto add = [&](std::string_view name, auto get) { columns.push_back(column(name, reports, get)); };
  add("ranks", [](const BenchReport& r) { return r.ranks; });
  add("runs_on", [](const BenchReport& r) { return r.backend; });
  add("rows_checked", [](const BenchReport& r) { return r.check.rows_checked; });
  add("rms_error", [](const BenchReport& r) { return r.check.verdict.rms_error; });
  add("plain_rms_error", [](const BenchReport& r) { return r.check.verdict.plain_rms_error; });
  add("median_ms", [](const BenchReport& r) { return r.median_ms; });
  add("min_ms", [](const BenchReport& r) { return r.min_ms; });
  add("p95_ms", [](const BenchReport& r) { return r.p95_ms; });
  add("repetitions", [](const BenchReport& r) { return std::ssize(r.samples_ms); });
  add("flops", [](const BenchReport& r) { return r.flops; });
  add("tflops_per_rank", [](const BenchReport& r) { return r.tflops_per_rank; });
  add("communication_ms", [](const BenchReport& r) { return r.run.communication_ms; });
  add("exposed_ms", [](const BenchReport& r) { return r.run.exposed_ms; });
  add("skew_ms", [](const BenchReport& r) { return r.run.skew_ms; });
  add("bytes_received", [](const BenchReport& r) { return r.bytes_received; });
  add("blocks_alone_ms", [](const BenchReport& r) { return r.blocks_alone_ms; });
  add("overlap_efficiency", [](const BenchReport& r) { return r.overlap_efficiency; });
  add("fma_peak_gflops", [](const BenchReport& r) { return r.peak_gflops; });
  add("of_peak", [](const BenchReport& r) { return r.of_peak; });
  add("memory_high_water", [](const BenchReport& r) { return r.memory_high_water; });
  return columns;
}

/// A field as RFC 4180 wants it.
std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) { return text; }
  std::string quoted = "\"";
  for (const char letter : text) {
    if (letter == '"') { quoted += '"'; }
    quoted += letter;
  }
  return quoted + '"';
}

std::string csv_of(const std::vector<BenchColumn>& columns, std::size_t rows) {
  std::string text;
  const auto add_line = [&](auto field) {
    std::vector<std::string> fields;
    for (const BenchColumn& column : columns) { fields.push_back(csv_field(field(column))); }
    text += fmt::format("{}\n", fmt::join(fields, ","));
  };
  add_line([](const BenchColumn& c) { return c.name; });
  for (std::size_t row = 0; row < rows; ++row) {
    add_line(
        [row](const BenchColumn& c) { return std::visit([row](const auto& values) { return fmt::format("{}", values[row]); }, c.values); });
  }
  return text;
}

std::vector<BenchDetail> details_of(const std::vector<BenchReport>& reports) {
  std::vector<BenchDetail> details;
  for (const BenchReport& report : reports) { details.push_back({report.samples_ms, report.timings}); }
  return details;
}

/// Rank 0 writes what was asked for; all ranks learn whether that went well. Collective.
void write_files(const Invocation& invocation, const Communicator& comm, const std::vector<BenchReport>& reports,
                 const std::string& hosts) {
  const Config& config = invocation.config;
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    const std::vector<BenchColumn> columns = columns_of(reports);
    if (!config.csv.empty()) { write_text_result(config.csv, config.force, csv_of(columns, reports.size())); }
    if (config.output.empty()) { return; }
    auto entries = provenance(invocation, config);
    entries.emplace_back("input", reports.front().input);
    entries.emplace_back("hosts", hosts);
    write_bench_file(config.output, config.force, columns, details_of(reports), entries);
  });
}

}  // namespace

ExitCode execute_bench(const Invocation& invocation, const Communicator& comm) {
  const bool sweeping = !invocation.config.sweep.empty();
  const bool prints = comm.rank() == 0 && !invocation.json;
  require_all_runnable(invocation, comm);
  const Table table(invocation.rows);
  if (prints && sweeping) { table.print_header(invocation.config.repetitions); }
  const Progress progress(prints);
  std::vector<BenchReport> reports;
  std::string hosts;
  for (std::size_t index = 0; index < invocation.rows.size(); ++index) {
    progress.show(fmt::format("row {} of {}", index + 1, invocation.rows.size()));
    with_row(invocation, index, [&](const BenchRow& row) { reports.push_back(bench(row.config, comm)); });
    progress.show("");
    const BenchReport& report = reports.back();
    if (index == 0) { hosts = host_lines(comm, report.backend); }
    if (!prints) { continue; }
    if (!sweeping) {
      fmt::print("# {}\n", line_of(report.check));
      table.print_header(invocation.config.repetitions);  // now that the row has turned out to be possible
    }
    table.print(invocation.rows[index], report);
  }
  if (comm.rank() == 0 && invocation.json) {
    Json rows = Json::array();
    for (std::size_t index = 0; index < reports.size(); ++index) { rows.push_back(json_of(invocation.rows[index], reports[index])); }
    fmt::print("{}\n", (sweeping ? rows : rows.front()).dump(2));
  }
  write_files(invocation, comm, reports, hosts);
  if (!prints) { return ExitCode::passed; }
  for (const std::string& path : {invocation.config.csv, invocation.config.output}) {
    if (!path.empty()) { fmt::print("# wrote {}\n", path); }
  }
  return ExitCode::passed;
}

}  // namespace annulus::app
