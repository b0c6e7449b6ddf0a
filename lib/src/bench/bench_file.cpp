// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/bench_file.hpp>

#include <annulus/core/error.hpp>

#include "io/hdf5_write.hpp"

#include <utility>

namespace annulus {

namespace {

void write_column(const Hdf5File& file, const std::string& name, const std::vector<std::int64_t>& values) {
  write_dataset(file, name, H5T_STD_I64LE, {values.size()}, values.data());
}
void write_column(const Hdf5File& file, const std::string& name, const std::vector<double>& values) {
  write_dataset(file, name, H5T_IEEE_F64LE, {values.size()}, values.data());
}
void write_column(const Hdf5File& file, const std::string& name, const std::vector<std::string>& values) {
  write_strings(file, name, values);
}

void write_steps(const Hdf5File& file, const std::string& folder, const std::vector<StepSummary>& steps) {
  const auto write = [&](const char* name, double StepSummary::* field) {
    std::vector<double> values;
    for (const StepSummary& step : steps) { values.push_back(step.*field); }
    write_column(file, folder + name, values);
  };
  write("/compute_ms", &StepSummary::compute_ms);
  write("/skew_ms", &StepSummary::skew_ms);
  write("/communication_ms", &StepSummary::communication_ms);
  write("/exposed_ms", &StepSummary::exposed_ms);
}

}  // namespace

struct BenchFile::Impl {
  UnfinishedPath place;
  bool written = false;
};

BenchFile::BenchFile(const std::string& path, bool force, std::int64_t least_bytes) : impl_(new Impl{.place = {path, force}}) {
  before_work([&] {
    impl_->place.reserve(least_bytes);
    const Hdf5Lock lock;
    Hdf5File(impl_->place).reserve_allocated(0);
  });
}

BenchFile::~BenchFile() = default;

void BenchFile::write(std::span<const BenchColumn> columns, std::span<const BenchDetail> details,
                      const std::vector<std::pair<std::string, std::string>>& provenance) {
  std::vector<double> samples;
  for (const BenchDetail& detail : details) {
    ANNULUS_EXPECTS(detail.samples_ms.size() == details.front().samples_ms.size(), "rows of {} and of {} repetitions",
                    details.front().samples_ms.size(), detail.samples_ms.size());
    samples.insert(samples.end(), detail.samples_ms.begin(), detail.samples_ms.end());
  }
  if (std::exchange(impl_->written, true)) { impl_->place.renew(); }
  const Hdf5Lock lock;
  Hdf5File file(impl_->place);
  for (const BenchColumn& column : columns) {
    std::visit(
        [&](const auto& values) {
          ANNULUS_EXPECTS(values.size() == details.size(), "column {} has {} values for {} rows", column.name, values.size(),
                          details.size());
          write_column(file, "/rows/" + column.name, values);
        },
        column.values);
  }
  const std::size_t repetitions = details.empty() ? 0 : details.front().samples_ms.size();
  write_dataset(file, "/samples_ms", H5T_IEEE_F64LE, {details.size(), repetitions}, samples.data());
  for (std::size_t row = 0; row < details.size(); ++row) {
    write_timing_tables(file, fmt::format("/timings/{}", row), details[row].timings);
    write_steps(file, fmt::format("/steps/{}", row), summarize_steps(details[row].timings));
  }
  for (const auto& [name, value] : provenance) { write_string(file, "/provenance/" + name, value); }
  file.commit();
}

}  // namespace annulus
