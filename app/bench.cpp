// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/bench.hpp>

#include <annulus/bench/calibrate.hpp>
#include <annulus/bench/figures.hpp>
#include <annulus/core/build_info.hpp>
#include <annulus/io/text_result.hpp>
#include <annulus/plan/plan_cache.hpp>

#include "bench_files.hpp"
#include "commands.hpp"
#include "config_file.hpp"
#include "machine_file.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "standard_output.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <string_view>

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

/// Everything that can be found wrong with the rows from number `first` on is found here, before that one runs. Collective.
void require_all_runnable(const Invocation& invocation, const Communicator& comm, PlanCache& plans, StopRequest& stop, std::size_t first) {
  if (invocation.rows.size() == 1) { return; }  // the row itself begins so
  const Progress progress(comm.rank() == 0 && !invocation.json);
  for (std::size_t index = first; index < invocation.rows.size() && !stop.agreed(comm); ++index) {
    progress.show(fmt::format("setting up row {} of {}", index + 1, invocation.rows.size()));
    with_row(invocation, index, [&](const BenchRow& row) { require_runnable(row.config, comm, plans); });
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
    say("# times in ms of the slowest rank, median of {}; flops = 4 x head-dim x visible (query, key) pairs\n", repetitions);
    say("# overlap: the same blocks without passing / median; of peak: of the fp32 FMA peak of a process's threads, or on a GPU of a "
        "plain\n");
    say("# 16-bit product; of cycles: of what tensor cores can do in the clock cycles that the steps took;\n");
    say("# predicted: by --machine's constants; pred err: that / median - 1;\n");
    say("# error: RMS error of the output that was timed / that of a plain run in the same dtype\n");
    for (const auto& [name, width] : swept_) { say("{:>{}} ", name, width); }
    say("{:>5} {:>9} {:>6} {:>6} {:>5} {:>6}", "ranks", "seq-len", "heads", "h-dim", "dtype", "causal");
    for (const Figure& figure : figures()) {
      if (!figure.heading.empty()) { say(" {:>{}}", figure.heading, figure.width); }
    }
    say("\n");
    flush_output();
  }

  void print(const BenchRow& row, const BenchReport& report) const {
    const Problem& problem = report.config.problem;
    for (const auto& [name, width] : swept_) { say("{:>{}} ", value_of(row, name), width); }
    say("{:>5} {:>9} {:>6} {:>6} {:>5} {:>6}", report.ranks, problem.seq_len, problem.heads, problem.head_dim, to_string(problem.dtype),
        problem.causal);
    for (const Figure& figure : figures()) {
      if (!figure.heading.empty()) { say(" {:>{}}", table_text(figure, report), figure.width); }
    }
    say("\n");
    flush_output();
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
  json["transport"] = to_string(report.config.transport);
  json["schedule"] = to_string(report.config.schedule);
  json["backend"] = report.backend;
  json["samples_ms"] = report.samples_ms;
  for (const Figure& figure : figures()) {
    std::visit([&](const auto& value) { json[std::string(figure.name)] = value; }, figure.get(report));
  }
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
  json["config"] = to_toml(row.config, Command::bench);
  return json;
}

/// Rows as one JSON document, printed as they come: a list, or without a sweep the one row. What ends early, by an error or by SIGTERM, is
/// closed, so that the rows so far can be read.
class JsonRows {
 public:
  JsonRows(bool enabled, bool is_list) : enabled_(enabled), is_list_(is_list) {}
  ~JsonRows() {
    set_open_ending(nullptr);
    if (rows_ > 0 && is_list_) { print_text(kEnding); }
  }
  JsonRows(const JsonRows&) = delete;
  JsonRows& operator=(const JsonRows&) = delete;

  void add(const BenchRow& row, const BenchReport& report) {
    if (!enabled_) { return; }
    const std::string document = json_of(row, report).dump(2);
    std::string text = !is_list_ ? "" : rows_ == 0 ? "[\n  " : ",\n  ";
    for (const char letter : document) {
      text += letter;
      if (letter == '\n' && is_list_) { text += "  "; }
    }
    if (!is_list_) { text += '\n'; }
    set_open_ending(nullptr);
    print_text(text);
    flush_output();
    if (is_list_) { set_open_ending(kEnding); }
    ++rows_;
  }

  /// A list of no rows is a document, too.
  void finish() const {
    if (enabled_ && is_list_ && rows_ == 0) { print_text("[]\n"); }
  }

 private:
  static constexpr const char* kEnding = "\n]\n";
  bool enabled_;
  bool is_list_;
  std::size_t rows_ = 0;
};

/// The machine of --machine, on rank 0; null on others and where none is named. Collective.
std::optional<Machine> machine_of(const Invocation& invocation, const Communicator& comm) {
  const Config& config = invocation.config;
  std::optional<Machine> machine;
  together(comm, [&] {
    // Before the first row: a time that cannot be predicted is no reason to lose those that were measured.
    const bool any_gradients = std::ranges::any_of(invocation.rows, [](const BenchRow& row) { return row.config.gradients; });
    ANNULUS_EXPECTS(config.machine.empty() || !any_gradients,
                    "--machine predicts no time of a backward pass, and --gradients asks for one");
    if (comm.rank() == 0 && !config.machine.empty()) { machine = read_machine(config.machine); }
  });
  return machine;
}

/// Measures the machine instead of rows. Collective.
ExitCode execute_calibration(const Invocation& invocation, const Communicator& comm) {
  const Config& config = invocation.config;
  std::unique_ptr<TextResult> file;
  together(comm, [&] {
    ANNULUS_EXPECTS(config.sweep.empty() && config.csv.empty() && config.output.empty() && config.input.empty() && !config.layer,
                    "--calibrate measures the machine and takes no --sweep, --csv, --output, --input or layer");
    if (comm.rank() == 0) { file = std::make_unique<TextResult>(config.calibrate, config.force); }
  });
  Machine machine = calibrate(config, comm);
  const std::string hosts = host_lines(comm, to_string(config.backend));
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    machine.source = fmt::format("annulus {} ({}), bench --calibrate on {:%Y-%m-%d}, {}", build_info().version, build_info().git,
                                 fmt::gmtime(std::time(nullptr)), hosts.substr(0, hosts.find('\n')));
    const std::string text = to_toml(machine);
    file->write("# Measured by annulus bench --calibrate\n" + text);
    if (!invocation.json) { say("{}# wrote {}\n", text, config.calibrate); }
  });
  return ExitCode::passed;
}

}  // namespace

ExitCode execute_bench(const Invocation& invocation, const Communicator& comm, StopRequest& stop) {
  if (!invocation.config.calibrate.empty()) { return execute_calibration(invocation, comm); }
  const bool sweeping = !invocation.config.sweep.empty();
  const bool prints = comm.rank() == 0 && !invocation.json;
  const std::optional<Machine> machine = machine_of(invocation, comm);
  std::vector<BenchReport> reports;
  BenchFiles files(invocation, comm);
  PlanCache plans(invocation.config.plan_cache);
  const std::size_t first = files.earlier();
  const std::size_t wanted = invocation.rows.size();
  require_all_runnable(invocation, comm, plans, stop, first);
  const Table table(invocation.rows);
  if (prints && first > 0) { say("# {} of {} rows are in {} already\n", first, wanted, invocation.config.output); }
  if (prints && sweeping && first < wanted) { table.print_header(invocation.config.repetitions); }
  JsonRows json_rows(comm.rank() == 0 && invocation.json, sweeping);
  const Progress progress(prints);
  std::string hosts;
  for (std::size_t index = first; index < wanted; ++index) {
    progress.show(fmt::format("row {} of {}", index + 1, invocation.rows.size()));
    std::optional<BenchReport> measured;
    with_row(invocation, index,
             [&](const BenchRow& row) { measured = bench(row.config, comm, plans, stop, machine ? &*machine : nullptr); });
    progress.show("");
    if (!measured) { break; }
    const BenchReport& report = reports.emplace_back(*std::move(measured));
    if (index == first) { hosts = host_lines(comm, report.backend); }
    files.write(comm, reports, hosts);
    json_rows.add(invocation.rows[index], report);
    if (!prints) { continue; }
    if (!sweeping) {
      say("# {}\n", line_of(report.check));
      table.print_header(invocation.config.repetitions);  // now that the row has turned out to be possible
    }
    table.print(invocation.rows[index], report);
    if (report.backward_ms > 0) {
      say("# backward pass alone: {:.3f} ms, {:.4f} TFLOP/s/rank (10 x head-dim x visible pairs)\n", report.backward_ms,
          report.backward_tflops_per_rank);
    }
  }
  files.finish(comm);
  json_rows.finish();
  const std::size_t done = first + reports.size();
  const bool stopped = done < wanted;
  const ExitCode code = stopped ? ExitCode::stopped : ExitCode::passed;
  if (stopped && comm.rank() == 0) {
    print_error(stopped_line(stop, static_cast<std::int64_t>(done), static_cast<std::int64_t>(wanted), "row"));
  }
  if (!prints) { return code; }
  say("# plans of this process: {} made, {} found in the cache of {}\n", plans.made(), plans.found(), plans.capacity());
  for (const std::string& path : {invocation.config.csv, invocation.config.output}) {
    if (!path.empty() && !reports.empty()) { say("# wrote {}\n", path); }
  }
  return code;
}

}  // namespace annulus::app
