// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/bench_file.hpp>

#include <annulus/core/error.hpp>

#include "io/hdf5_write.hpp"

#include <utility>

namespace annulus {

namespace {

std::vector<NamedColumn> summary_columns(const std::vector<StepSummary>& steps) {
  const auto column = [&](const char* name, double StepSummary::* field) {
    std::vector<double> values;
    for (const StepSummary& step : steps) { values.push_back(step.*field); }
    return NamedColumn{name, std::move(values)};
  };
  return {column("compute_ms", &StepSummary::compute_ms), column("skew_ms", &StepSummary::skew_ms),
          column("communication_ms", &StepSummary::communication_ms), column("exposed_ms", &StepSummary::exposed_ms)};
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

void BenchFile::write(std::span<const NamedColumn> columns, std::span<const BenchDetail> details,
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
  write_columns(file, "/rows", {details.size()}, columns);
  const std::size_t repetitions = details.empty() ? 0 : details.front().samples_ms.size();
  write_dataset(file, "/samples_ms", H5T_IEEE_F64LE, {details.size(), repetitions}, samples.data());
  for (std::size_t row = 0; row < details.size(); ++row) {
    const StepColumns timings = step_columns(details[row].timings);
    write_columns(file, fmt::format("/timings/{}", row), {static_cast<hsize_t>(timings.ranks), static_cast<hsize_t>(timings.steps)},
                  timings.columns);
    const std::vector<StepSummary> steps = summarize_steps(details[row].timings);
    write_columns(file, fmt::format("/steps/{}", row), {steps.size()}, summary_columns(steps));
  }
  for (const auto& [name, value] : provenance) { write_string(file, "/provenance/" + name, value); }
  file.commit();
}

}  // namespace annulus
