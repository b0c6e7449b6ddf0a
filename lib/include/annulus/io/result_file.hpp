// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/problem.hpp>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace annulus {

/// Times and bytes of one step of one rank.
struct StepTiming {
  double compute_ms = 0;
  double communication_ms = 0;  ///< post to completion of the step's messages
  double exposed_ms = 0;        ///< waited for them
  std::int64_t bytes_sent = 0;
  std::int64_t bytes_received = 0;
  /// When the step's work and its messages' copies ran, milliseconds since the rank posted step 1; NaN for what the step lacks or nobody
  /// timed.
  double work_begin_ms = std::numeric_limits<double>::quiet_NaN();
  double work_end_ms = std::numeric_limits<double>::quiet_NaN();
  double transfer_begin_ms = std::numeric_limits<double>::quiet_NaN();
  double transfer_end_ms = std::numeric_limits<double>::quiet_NaN();
};

/// One HDF5 result file, written by one process: /o [batch, seq, heads, head_dim] in the problem's dtype, /lse [batch, head, seq] fp32,
/// /timings/{compute_ms, communication_ms, exposed_ms, bytes_sent, bytes_received, work_begin_ms, work_end_ms, transfer_begin_ms,
/// transfer_end_ms} [rank, step], /provenance/* strings.
///
/// It is written beside its place under a temporary name, synced and renamed by commit(): complete or absent. The destructor without commit
/// removes the temporary file; so does remove_unfinished_results(), which signal handlers and aborts may call.
/// bf16 is a 16-bit HDF5 float with 8 exponent bits. HDF5 never converts a float here: memory type = file type.
class ResultFile {
 public:
  /// @throws InvalidArgument if `path` exists and not `force`, or its folder cannot be written
  ResultFile(const std::string& path, bool force, const Problem& problem);
  ~ResultFile();
  ResultFile(const ResultFile&) = delete;
  ResultFile& operator=(const ResultFile&) = delete;

  /// Rows [first, first+count) of one batch entry of /o; `rows` is [count, heads, head_dim] in the problem's dtype.
  void write_output(std::int64_t batch, std::int64_t first, std::int64_t count, const void* rows);
  /// /lse[batch, all heads, first .. first+count); `lse` is [heads, count].
  void write_lse(std::int64_t batch, std::int64_t first, std::int64_t count, const float* lse);
  /// timings[rank][step]; ranks may have different numbers of steps (missing ones are written as 0).
  void write_timings(const std::vector<std::vector<StepTiming>>& timings);
  /// Name and value pairs under /provenance, in order; each a scalar UTF-8 string dataset.
  void write_provenance(const std::vector<std::pair<std::string, std::string>>& entries);
  /// Flushes, syncs file and folder, renames into place. @throws RuntimeFailure if the disk refuses
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Checks what can be known before any work: whether a result could be put at `path`. @throws InvalidArgument
void check_result_path(const std::string& path, bool force);

/// Writes a text file by the same atomic rule. @throws InvalidArgument as check_result_path(), RuntimeFailure if the disk refuses
void write_text_result(const std::string& path, bool force, std::string_view text);

/// Unlinks the temporary file of an unfinished ResultFile of this process, if any. Async-signal-safe.
void remove_unfinished_results() noexcept;

/// Writes a Q, K, V input file with the generator's values, made by `threads` threads; same atomic rule as ResultFile. `scale` becomes its
/// attribute.
void write_generated_input(const std::string& path, bool force, const Problem& problem, std::uint64_t seed, int threads = 1);

}  // namespace annulus
