// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/bench/step_summary.hpp>
#include <annulus/core/named_column.hpp>
#include <annulus/core/step_timing.hpp>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace annulus {

/// What one row holds beyond its columns.
struct BenchDetail {
  std::vector<double> samples_ms;                ///< one for each repetition, as many for every row
  std::vector<std::vector<StepTiming>> timings;  ///< [rank][step]
};

/// What a BenchFile holds, as write() was given it.
struct BenchContents {
  std::vector<NamedColumn> columns;  ///< in alphabetical order
  std::vector<BenchDetail> details;  ///< one for each row; a rank's steps as step_columns() fills them up
  std::vector<std::pair<std::string, std::string>> provenance;

  std::int64_t rows() const { return static_cast<std::int64_t>(details.size()); }
  /// The column or the text of the provenance of that name; null if there is none.
  const NamedColumn* column(std::string_view name) const;
  const std::string* text(std::string_view name) const;
};

/// Reads a file that BenchFile wrote. @throws InvalidArgument if there is none at `path` that can be read
BenchContents read_bench_file(const std::string& path);

/// An HDF5 file that grows while it is worked for: after every write() a complete file of the rows so far is at its place, put there by the
/// atomic rule of ResultFile. Until the first one there is nothing.
class BenchFile {
 public:
  /// @param least_bytes that there must be room for
  /// @throws InvalidArgument if `path` exists and not `force`, it cannot be created or replaced, or there is no room
  BenchFile(const std::string& path, bool force, std::int64_t least_bytes = 0);
  ~BenchFile();
  BenchFile(const BenchFile&) = delete;
  BenchFile& operator=(const BenchFile&) = delete;

  /// /rows/<column> [row] int64, fp64 or strings; /samples_ms [row, repetition] fp64; for row i /timings/<i>/* [rank, step], the numbers of
  /// StepTiming, and /steps/<i>/{compute_ms, skew_ms, communication_ms, exposed_ms} [step], the fields of StepSummary; /provenance/*
  /// strings.
  /// @throws InvalidArgument if the columns are not of one length; RuntimeFailure if the disk refuses, or another program took the place:
  /// what was there stays
  void write(std::span<const NamedColumn> columns, std::span<const BenchDetail> details,
             const std::vector<std::pair<std::string, std::string>>& provenance);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace annulus
