// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/named_column.hpp>
#include <annulus/core/problem.hpp>
#include <annulus/io/source.hpp>

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

/// Rows of a result, each a (batch, head, row), that say something about it.
struct RowCounts {
  std::int64_t uncovered =
      0;  ///< that see no key, as there are no extra ones, and no branch covers them or kv_lengths hides all: O is 0, LSE -inf
  /// With NaN or infinity in O, or an LSE that is no number though the row is covered; of a layer also, as head 0, with NaN or infinity in
  /// y alone.
  std::int64_t non_finite = 0;
  std::array<std::int64_t, 3> first_non_finite{-1, -1, -1};  ///< the least (batch, head, row) of them; -1 if there is none
  /// Under Ragged::zero_keys, by branch: what share of the softmax over all branches' keys its keys of zeros took, a mean over the rows
  /// that it covers. Empty under other rules.
  std::vector<double> zero_key_shares;
};

/// Neighbouring rows of one batch entry, with neighbouring heads.
struct ResultBox {
  std::int64_t batch = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
  std::int64_t first_head = 0;
  std::int64_t heads = 0;
};

/// What a result holds besides tables.
enum class ResultTensors {
  output,     ///< O, or y, and LSE
  gradients,  ///< and dQ, dK and dV
};

/// Columns that stand in a folder of a file, all of these extents.
struct ColumnTable {
  std::string folder;
  std::vector<std::int64_t> extents;
  std::vector<NamedColumn> columns;
};

/// Where a result stands that is written in several runs of the program, beside the place that it takes when it is complete.
std::string unfinished_result_path(const std::string& path);

/// A column, or a scalar, of a result that is there, complete or not.
/// @throws InvalidArgument if it is no readable HDF5 file or has no such column
ColumnValues read_result(const std::string& path, const std::string& column);

/// One HDF5 result file, written by one process: /o [batch, seq, heads, head_dim] in the problem's dtype (of a layer /y [batch, seq, embed]
/// instead), /lse [batch, head, seq] fp32, with gradients /dq, /dk and /dv in the shapes of Q, K and V,
/// tables of named columns, /rows/{uncovered, non_finite, first_non_finite} int64, /rows/zero_key_shares [branch] fp64, /provenance/*
/// strings.
///
/// It is written in the folder of its place, without a name where the file system can do that and else under a random temporary one, synced
/// and renamed by commit(): complete or absent. The destructor without commit removes the temporary file; so does
/// remove_unfinished_results(), which signal handlers and aborts may call. What is complete is never removed: where it cannot be renamed
/// into place it is kept, and the error names it. bf16 is a 16-bit HDF5 float with 8 exponent bits. HDF5 never converts a float here:
/// memory type = file type.
class ResultFile {
 public:
  /// Creates the file and takes the disk's blocks for all of it, so that it can be done before any work: what does not fit is known now.
  /// @param table_bytes  of the values that write_columns() will be given, at least
  /// @param embed        features of a row of /y; 0 without a layer
  /// @throws InvalidArgument if `path` exists and not `force`, it cannot be created or replaced, or there is no room
  ResultFile(const std::string& path, bool force, const Problem& problem, std::int64_t table_bytes = 0, std::int64_t embed = 0,
             ResultTensors tensors = ResultTensors::output);
  /// Puts a file at unfinished_result_path(path) that has a place for all that a result holds: rows, `tables`, whose values stand there
  /// until others are written, /rows with none counted, and provenance. From then on values alone are written and none of HDF5's own
  /// tables, so that whatever ends a process leaves a file that another can go on with.
  /// @param zero_key_branches  of /rows/zero_key_shares, or 0
  /// @throws InvalidArgument as above, or if the unfinished file is in use, or exists and not `force`
  static void create_resumable(const std::string& path, bool force, const Problem& problem, std::int64_t embed, ResultTensors tensors,
                               std::span<const ColumnTable> tables, std::int64_t zero_key_branches,
                               const std::vector<std::pair<std::string, std::string>>& provenance);
  /// Goes on with the file that create_resumable() left. Whatever ends the process leaves it, and no other process can go on with it
  /// meanwhile. Rows, rows of columns and counts may be written; commit() requires that every row was written or said to be there.
  /// @throws InvalidArgument as above, or if there is no such file, it is in use, or of another problem
  static std::unique_ptr<ResultFile> resume(const std::string& path, bool force, const Problem& problem, std::int64_t embed = 0,
                                            ResultTensors tensors = ResultTensors::output);
  ~ResultFile();
  ResultFile(const ResultFile&) = delete;
  ResultFile& operator=(const ResultFile&) = delete;

  /// A part of /o; `rows` is [count, heads, head_dim] in the problem's dtype. Of /y, whose rows have no heads: [count, embed], with a box
  /// of all heads.
  void write_output(const ResultBox& box, const void* rows);
  /// A part of the gradient of a tensor; `rows` is [count, heads, head_dim] in the problem's dtype, and the box's heads are of the tensor.
  void write_gradient(Tensor tensor, const ResultBox& box, const void* rows);
  /// A part of /lse; `lse` is [heads, count].
  void write_lse(const ResultBox& box, const float* lse);
  /// <folder>/<name> of these extents for each column, int64, fp64 or UTF-8 strings.
  /// @throws InvalidArgument if a column has another number of values
  void write_columns(const std::string& folder, std::span<const std::int64_t> extents, std::span<const NamedColumn> columns);
  /// /rows/uncovered and /rows/non_finite, /rows/first_non_finite [batch, head, row] if there is one, and /rows/zero_key_shares [branch]
  /// unless it is empty.
  void write_counts(const RowCounts& counts);
  /// Name and value pairs under /provenance, in order; each a scalar UTF-8 string dataset.
  void write_provenance(const std::vector<std::pair<std::string, std::string>>& entries);
  /// Of a file that is gone on with: a column's element or row `index`, and a whole column.
  /// @throws InvalidArgument if there is no such column or it is of another type
  void write_row(const std::string& column, std::int64_t index, const ColumnValues& values);
  ColumnValues read_column(const std::string& column) const;
  /// Says that all rows of so many batch entries were written before.
  void count_written(std::int64_t entries);
  /// What was written is on the disk when this returns. @throws RuntimeFailure
  void sync();
  /// Flushes, syncs file and folder, renames into place. @throws RuntimeFailure if the disk refuses, or the complete file cannot take its
  /// place (another program took it, and not `force`): it is then kept, and named
  void commit();

 private:
  struct Impl;
  explicit ResultFile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Checks what can be known before any work: whether a result could be put at `path`. @throws InvalidArgument
void check_result_path(const std::string& path, bool force);

/// Unlinks the temporary files of this process's unfinished results, if they are still the files that it created;
/// one that is complete and on its way to its place is left, and named on standard error. Async-signal-safe.
void remove_unfinished_results() noexcept;

/// Writes a Q, K, V input file with the generator's values, made by `threads` threads; same atomic rule as ResultFile. `scale` becomes its
/// attribute, kv_lengths its dataset /kv_lengths; there are /k_extra and /v_extra if the problem has extra keys.
void write_generated_input(const std::string& path, bool force, const Problem& problem, std::uint64_t seed, int threads = 1);

}  // namespace annulus
