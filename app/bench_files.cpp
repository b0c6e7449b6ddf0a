// SPDX-License-Identifier: Apache-2.0
#include "bench_files.hpp"

#include <annulus/bench/figures.hpp>

#include "bench_resume.hpp"
#include "config_file.hpp"
#include "csv.hpp"
#include "options.hpp"
#include "report.hpp"

#include <spdlog/spdlog.h>

#include <iterator>
#include <string_view>
#include <utility>
#include <variant>

namespace annulus::app {

namespace {

/// A column of one number or text of every report.
template <class Get>
NamedColumn column(std::string_view name, const std::vector<BenchReport>& reports, Get get) {
  std::vector<decltype(get(reports.front()))> values;
  for (const BenchReport& report : reports) { values.push_back(get(report)); }
  return {std::string(name), std::move(values)};
}

/// The options of problem, pattern and execution as the rows ran, named like the flags, then what was measured.
std::vector<NamedColumn> columns_of(const std::vector<BenchReport>& reports) {
  std::vector<NamedColumn> columns;
  for (const Option& option : options()) {
    if (!is_of_row(option.scope)) { continue; }
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
  for (const Figure& figure : figures()) {
    // What a figure is for one report it is for all.
    std::visit(
        [&]<class Held>(const Held& /*first*/) {
          columns.push_back(column(figure.name, reports, [&](const BenchReport& r) { return std::get<Held>(figure.get(r)); }));
        },
        figure.get(reports.front()));
  }
  return columns;
}

/// Whether the job that left these rows wrote them to the CSV file `path` as well.
bool wrote_csv(const BenchContents& earlier, const std::string& path) {
  const std::string* const text = earlier.text("config");
  if (text == nullptr || path.empty()) { return false; }
  Draft draft;
  apply_config(draft, *text, path);
  return draft.config.csv == path;
}

/// The columns of an earlier job in the order that columns_of() gives them.
std::vector<NamedColumn> in_order(const BenchContents& earlier) {
  std::vector<NamedColumn> columns;
  const auto add = [&](std::string_view name) {
    const NamedColumn* const column = earlier.column(name);
    if (column != nullptr) { columns.push_back(*column); }
  };
  for (const Option& option : options()) {
    if (is_of_row(option.scope)) { add(option.name); }
  }
  for (const Figure& figure : figures()) { add(figure.name); }
  return columns;
}

/// Puts the values of an earlier job's column before the same column's of this one.
void put_before(NamedColumn& column, const BenchContents& earlier) {
  const NamedColumn* const before = earlier.column(column.name);
  const bool alike = before != nullptr && before->values.index() == column.values.index();
  ANNULUS_EXPECTS(alike, "--resume: the earlier rows have no {} as this version has", column.name);
  std::visit(
      [&]<class Values>(Values& values) {
        const Values& first = std::get<Values>(before->values);
        values.insert(values.begin(), first.begin(), first.end());
      },
      column.values);
}

/// Room that the rows need at least: two characters of a CSV field, and the tables of a step.
std::int64_t least_bytes(std::size_t rows, std::int64_t row_bytes) { return static_cast<std::int64_t>(rows + 1) * row_bytes; }

}  // namespace

BenchFiles::BenchFiles(const Invocation& invocation, const Communicator& comm) : invocation_(invocation) {
  const Config& config = invocation.config;
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    constexpr std::int64_t kCsvRow = 100;
    constexpr std::int64_t kHdf5Row = 2000;
    const std::size_t rows = invocation.rows.size();
    earlier_ = earlier_rows(invocation, comm.size());
    if (earlier_) { earlier_count_ = earlier_->details.size(); }
    // A CSV file beside the rows is theirs, and is made anew from them.
    const bool replaces_csv = config.force || (earlier_ && wrote_csv(*earlier_, config.csv));
    if (!config.csv.empty()) { csv_ = std::make_unique<TextResult>(config.csv, replaces_csv, least_bytes(rows, kCsvRow)); }
    // It may lack a row that is in --output: that one is written first.
    if (csv_ && earlier_) { csv_->write(csv_of(in_order(*earlier_), earlier_count_)); }
    if (!config.output.empty()) {
      hdf5_ = std::make_unique<BenchFile>(config.output, config.force || earlier_.has_value(), least_bytes(rows, kHdf5Row));
    }
  });
  earlier_count_ = static_cast<std::size_t>(comm.max(static_cast<std::int64_t>(earlier_count_)));
}

BenchFiles::~BenchFiles() {
  if (put_off_ == nullptr) { return; }
  try {
    write_rows(*put_off_, hosts_);
  } catch (const std::exception& error) { spdlog::error("{}", error.what()); }
}

void BenchFiles::write(const Communicator& comm, const std::vector<BenchReport>& reports, const std::string& hosts) {
  together(comm, [&] {
    if (!csv_ && !hdf5_) { return; }
    constexpr std::chrono::milliseconds kCheap{200};
    const Clock::time_point begin = Clock::now();
    put_off_ = &reports;
    hosts_ = hosts;
    if (cost_ > kCheap && begin - written_ < 10 * cost_ && earlier_count_ + reports.size() < invocation_.rows.size()) { return; }
    put_off_ = nullptr;
    write_rows(reports, hosts);
    written_ = Clock::now();
    cost_ = written_ - begin;
  });
}

void BenchFiles::finish(const Communicator& comm) {
  together(comm, [&] {
    const std::vector<BenchReport>* rows = std::exchange(put_off_, nullptr);
    if (rows != nullptr) { write_rows(*rows, hosts_); }
  });
}

void BenchFiles::write_rows(const std::vector<BenchReport>& reports, const std::string& hosts) {
  std::vector<NamedColumn> columns = columns_of(reports);
  std::vector<BenchDetail> details;
  std::string all_hosts = hosts;
  if (earlier_) {
    for (NamedColumn& column : columns) { put_before(column, *earlier_); }
    details = earlier_->details;
    const std::string* const before = earlier_->text("hosts");
    all_hosts = fmt::format("{}from row {} on:\n{}", before == nullptr ? std::string() : *before, earlier_count_ + 1, hosts);
  }
  for (const BenchReport& report : reports) { details.push_back({report.samples_ms, report.timings}); }
  const std::size_t rows = details.size();
  if (hdf5_) {
    auto entries = provenance(invocation_, invocation_.config);
    entries.emplace_back("input", reports.front().input);
    entries.emplace_back("hosts", all_hosts);
    entries.emplace_back("rows", fmt::format("{} of {}", rows, invocation_.rows.size()));
    hdf5_->write(columns, details, entries);
  }
  if (csv_) { csv_->write(csv_of(columns, rows)); }
}

}  // namespace annulus::app
