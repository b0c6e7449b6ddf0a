// SPDX-License-Identifier: Apache-2.0
// The independent checker. It shares no index code with the path it checks: membership is decided token by token from the operator's
// definition, and data is read from the source itself.
#pragma once

#include <annulus/core/problem.hpp>
#include <annulus/io/source.hpp>

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

namespace annulus {

/// What a plain run does to probabilities before they meet V.
enum class PlainProbabilities {
  kept,     ///< fp32
  rounded,  ///< to the dtype; a row's largest is 1, and exact
  /// As rounded, and again in kPlainScales further runs with all of a row's probabilities scaled by a factor in [1, 2): for kernels that
  /// scale a row by a score that need not be its largest. In a small problem the few roundings that matter differ much from run to run.
  rounded_at_scales,
};
inline constexpr int kPlainScales = 8;

/// Attention of chosen rows in fp64, and of the same rows by a plain run in the problem's dtype. Index [row][head][head_dim] and
/// [row][head].
struct OracleRows {
  List<double> out;        ///< fp64 throughout
  List<double> lse;        ///< -inf where no branch covers the row
  List<double> plain_lse;  ///< of the plain run
  List<float> plain_out;   ///< plain run: same-dtype inputs, one pass over all keys, fp32 scores and sums, output rounded once
  std::vector<std::vector<float>> scaled_out;  ///< as plain_out, of the further runs of PlainProbabilities::rounded_at_scales
  List<double> max_score;                      ///< [row][head] largest |scale * <q, k>| met
  double value_squares = 0;                    ///< sum of v^2 over value_count elements of the V rows that some checked row sees
  std::int64_t value_count = 0;
};

/// Rows of Q, K and V in fp64, where what is attended is itself computed: the plain run takes a source's rows, and the exact one these.
class ExactRows {
 public:
  virtual ~ExactRows() = default;
  /// Rows [first, first+count) of one batch entry, [count, heads of that tensor, head_dim].
  virtual void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, double* out) const = 0;
};

/// A row to check.
struct RowId {
  std::int64_t batch = 0;
  std::int64_t row = 0;  ///< global
};

/// Which query heads are asked for; the places of the others hold nothing.
struct CheckedHeads {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

/// Computes the rows from the definition. `problem` gives dtype, causal and scale; extents must be the source's. Inputs are converted to
/// problem.dtype once.
///
/// `pattern.order` permutes the sequence first and the result back: rows are those of the source.
/// Pure: nothing is in flight at return. Rows may come in any order and repeat; a row's result does not depend on the other rows or on
/// `threads`. Memory: the rows asked for and 64 MiB of K and V, whatever seq_len (in a permuted order 16 bytes for every token); only
/// segments that hold a row are read, from one thread. Maxima are found in a first pass over the keys and sums in a second, in key order,
/// both in fp64 and for the plain run in fp32. Adds to `progress`, unless it is null, while it works.
/// With `exact` rows the fp64 run takes its inputs from there.
/// @throws InvalidArgument if the extents are not the source's, a row or head lies outside, or problem or pattern is not valid
OracleRows oracle_rows(const TensorSource& source, const Problem& problem, const Pattern& pattern, std::span<const RowId> rows,
                       const CheckedHeads& heads, PlainProbabilities probabilities, int threads,
                       std::atomic<std::uint64_t>* progress = nullptr, const ExactRows* exact = nullptr);
/// Of all heads.
OracleRows oracle_rows(const TensorSource& source, const Problem& problem, const Pattern& pattern, std::span<const RowId> rows,
                       PlainProbabilities probabilities, int threads, std::atomic<std::uint64_t>* progress = nullptr);

}  // namespace annulus
