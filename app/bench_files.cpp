// SPDX-License-Identifier: Apache-2.0
#include "bench_files.hpp"

#include <annulus/bench/figures.hpp>

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

std::vector<BenchDetail> details_of(const std::vector<BenchReport>& reports) {
  std::vector<BenchDetail> details;
  for (const BenchReport& report : reports) { details.push_back({report.samples_ms, report.timings}); }
  return details;
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
    if (!config.csv.empty()) { csv_ = std::make_unique<TextResult>(config.csv, config.force, least_bytes(rows, kCsvRow)); }
    if (!config.output.empty()) { hdf5_ = std::make_unique<BenchFile>(config.output, config.force, least_bytes(rows, kHdf5Row)); }
  });
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
    if (cost_ > kCheap && begin - written_ < 10 * cost_ && reports.size() < invocation_.rows.size()) { return; }
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
  const std::vector<NamedColumn> columns = columns_of(reports);
  if (hdf5_) {
    auto entries = provenance(invocation_, invocation_.config);
    entries.emplace_back("input", reports.front().input);
    entries.emplace_back("hosts", hosts);
    entries.emplace_back("rows", fmt::format("{} of {}", reports.size(), invocation_.rows.size()));
    hdf5_->write(columns, details_of(reports), entries);
  }
  if (csv_) { csv_->write(csv_of(columns, reports.size())); }
}

}  // namespace annulus::app
