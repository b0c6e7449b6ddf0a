// SPDX-License-Identifier: Apache-2.0
// The files of `bench`: rows are in them as soon as they are measured.
#pragma once

#include <annulus/bench/bench.hpp>
#include <annulus/bench/bench_file.hpp>
#include <annulus/io/text_result.hpp>
#include <annulus/job/communicator.hpp>

#include "commands.hpp"

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace annulus::app {

class BenchFiles {
 public:
  /// Creates on rank 0 what --csv and --output ask for, so that whatever keeps them from being written is known before the first row; with
  /// --resume they begin with the rows that are in --output. Collective.
  /// @throws AgreedError as TextResult, BenchFile and earlier_rows(), or if both are one file
  BenchFiles(const Invocation& invocation, const Communicator& comm);
  /// Writes rows that were put off, if the job fails.
  ~BenchFiles();
  BenchFiles(const BenchFiles&) = delete;
  BenchFiles& operator=(const BenchFiles&) = delete;

  /// How many rows the files had to begin with. The same on all ranks.
  std::size_t earlier() const { return earlier_count_; }

  /// Brings the files up to `reports`, the rows so far that this job has measured. A table so long that writing it takes time is not
  /// written after every row, but for a tenth of the time, and when it is complete. Collective.
  /// @param hosts as host_lines() @throws AgreedError if the disk refuses; the rows written before are still there
  void write(const Communicator& comm, const std::vector<BenchReport>& reports, const std::string& hosts);
  /// Writes rows that were put off, for there will be no others. Collective. @throws AgreedError as write()
  void finish(const Communicator& comm);

 private:
  using Clock = std::chrono::steady_clock;
  void write_rows(const std::vector<BenchReport>& reports, const std::string& hosts);

  const Invocation& invocation_;
  std::optional<BenchContents> earlier_;  ///< rank 0
  std::size_t earlier_count_ = 0;
  std::unique_ptr<TextResult> csv_;
  std::unique_ptr<BenchFile> hdf5_;
  Clock::time_point written_{};
  Clock::duration cost_{};
  const std::vector<BenchReport>* put_off_ = nullptr;
  std::string hosts_;
};

}  // namespace annulus::app
