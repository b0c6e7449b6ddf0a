// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/bench_file.hpp>

#include <annulus/core/error.hpp>

#include "io/hdf5_read.hpp"
#include "io/hdf5_write.hpp"

#include <algorithm>
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

/// The values of a column that must have these extents and hold numbers of this kind.
template <class Number>
const std::vector<Number>& values_of(const std::string& what, const ReadColumn& read, const std::vector<std::int64_t>& extents) {
  const auto* const values = std::get_if<std::vector<Number>>(&read.column.values);
  ANNULUS_EXPECTS(values != nullptr && read.extents == extents, "{}: {} is not what a table of bench has there", what, read.column.name);
  return *values;
}

/// [rank][step], of columns [rank, step].
std::vector<std::vector<StepTiming>> read_timings(const ReadableFile& file, const std::string& what, std::size_t row) {
  const std::string folder = fmt::format("/timings/{}", row);
  std::vector<std::vector<StepTiming>> timings;
  std::vector<std::int64_t> extents;
  for (const StepNumber& number : kStepNumbers) {
    const ReadColumn read = read_column(file, what, folder, std::string(number.name));
    if (extents.empty()) {
      extents = read.extents;
      ANNULUS_EXPECTS(extents.size() == 2, "{}: {} is no table of ranks and steps", what, folder);
      timings.assign(static_cast<std::size_t>(extents[0]), std::vector<StepTiming>(static_cast<std::size_t>(extents[1])));
    }
    std::visit(
        [&]<class Number>(Number StepTiming::* field) {
          auto value = values_of<Number>(what, read, extents).begin();
          for (std::vector<StepTiming>& rank : timings) {
            for (StepTiming& step : rank) { step.*field = *value++; }
          }
        },
        number.field);
  }
  return timings;
}

}  // namespace

const NamedColumn* BenchContents::column(std::string_view name) const {
  const auto found = std::ranges::find(columns, name, &NamedColumn::name);
  return found == columns.end() ? nullptr : &*found;
}

const std::string* BenchContents::text(std::string_view name) const {
  const auto found = std::ranges::find(provenance, name, &std::pair<std::string, std::string>::first);
  return found == provenance.end() ? nullptr : &found->second;
}

BenchContents read_bench_file(const std::string& path) {
  const std::string what = fmt::format("result file '{}'", path);
  const Hdf5Lock lock;
  const ReadableFile file(what, path);
  BenchContents contents;
  const ReadColumn samples = read_column(file, what, "", "samples_ms");
  ANNULUS_EXPECTS(samples.extents.size() == 2, "{}: /samples_ms is no table of rows and repetitions", what);
  const std::vector<double>& all = values_of<double>(what, samples, samples.extents);
  const std::vector<std::int64_t> rows{samples.extents[0]};
  for (std::int64_t row = 0; row < rows[0]; ++row) {
    const auto begin = all.begin() + row * samples.extents[1];
    contents.details.push_back({{begin, begin + samples.extents[1]}, read_timings(file, what, static_cast<std::size_t>(row))});
  }
  for (ReadColumn& read : read_columns(file, what, "/rows")) {
    ANNULUS_EXPECTS(read.extents == rows, "{}: /rows/{} has not one value for each of {} rows", what, read.column.name, rows[0]);
    contents.columns.push_back(std::move(read.column));
  }
  contents.provenance = read_texts(file, what, "/provenance");
  return contents;
}

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
