// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/bench/step_summary.hpp>
#include <annulus/io/result_file.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace annulus {

/// One column of a table of measurements, a value for each row.
struct BenchColumn {
  std::string name;
  std::variant<std::vector<std::int64_t>, std::vector<double>, std::vector<std::string>> values;
};

/// What one row holds beyond its columns.
struct BenchDetail {
  std::vector<double> samples_ms;                ///< one for each repetition, as many for every row
  std::vector<std::vector<StepTiming>> timings;  ///< [rank][step]
};

/// Writes an HDF5 file by the rule of ResultFile (complete or absent): /rows/<column> [row] int64, fp64 or strings; /samples_ms
/// [row, repetition] fp64; for row i /timings/<i>/* [rank, step], the tables of ResultFile, and /steps/<i>/{compute_ms, skew_ms,
/// communication_ms, exposed_ms} [step], the fields of StepSummary; /provenance/* strings.
/// @throws InvalidArgument if `path` exists and not `force`, or the columns are not of one length; RuntimeFailure if the disk refuses
void write_bench_file(const std::string& path, bool force, std::span<const BenchColumn> columns, std::span<const BenchDetail> details,
                      const std::vector<std::pair<std::string, std::string>>& provenance);

}  // namespace annulus
