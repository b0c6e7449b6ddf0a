// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/problem.hpp>
#include <annulus/verify/oracle.hpp>

#include <array>
#include <cstdint>
#include <span>
#include <string>

namespace annulus {

/// Sums from which ranks agree on one verdict: add() merges the rows of several ranks.
struct ErrorSums {
  std::int64_t count = 0;                                   ///< output elements compared
  double error_squares = 0;                                 ///< sum (out - oracle)^2
  double plain_error_squares = 0;                           ///< sum (plain - oracle)^2
  std::array<double, kPlainScales> scaled_error_squares{};  ///< the same of the further plain runs; 0 without them
  double oracle_squares = 0;                                ///< sum oracle^2
  double value_squares = 0;                                 ///< sum v^2 over value_count elements of V
  std::int64_t value_count = 0;
  double max_error = 0;
  double max_plain_error = 0;
  std::int64_t worst[4] = {0, 0, 0, 0};  ///< batch, row, head, dim of max_error
  double max_lse_error = 0;
  std::int64_t worst_lse[3] = {0, 0, 0};  ///< batch, row, head
  double max_plain_lse_error = 0;
  double max_score = 0;
  std::int64_t non_finite_mismatches = 0;  ///< positions where exactly one side is NaN or infinite, or they differ in kind
  std::int64_t first_mismatch[4] = {0, 0, 0, 0};
  std::int64_t uncovered = 0;  ///< (batch, head, row) with lse -inf
  void add(const ErrorSums& other);
};

/// Compares some heads of rows with the oracle's. `out` [row][heads.count][head_dim] in problem.dtype, `lse` [row][heads.count]; the oracle
/// has room for all heads. NaN and infinities are compared by position.
ErrorSums compare_rows(const Problem& problem, std::span<const RowId> rows, const CheckedHeads& heads, const void* out, const float* lse,
                       const OracleRows& oracle);
/// All heads.
ErrorSums compare_rows(const Problem& problem, std::span<const RowId> rows, const void* out, const float* lse, const OracleRows& oracle);

/// Compares LSE alone, `lse` [row][heads.count], and adds to sums what comes of it.
void add_lse(const Problem& problem, std::span<const RowId> rows, const CheckedHeads& heads, const float* lse, const OracleRows& oracle,
             ErrorSums& sums);

/// That the sums are of `rows` whole rows, so that no row which a report counts as checked was left out by every rank or taken by two.
/// @throws AssertionFailure with both numbers
void require_all_compared(const Problem& problem, std::int64_t rows, const ErrorSums& sums);

struct Verdict {
  bool passed = false;
  double rms_error = 0;
  double plain_rms_error = 0;
  double ratio = 0;          ///< rms_error / plain_rms_error (0/0 is 0)
  double limit = 0;          ///< on rms_error
  double element_limit = 0;  ///< on max_error
  double lse_limit = 0;
  std::string reason;  ///< empty when passed; otherwise one sentence that names the worst index
};

/// `plain_rms_error` is the largest of all plain runs'. The limits: fp32: rms_error <= 2e-6 * max(RMS(O), 0.1 RMS(V)); 16-bit: rms_error
/// <= 1.2 * plain_rms_error + a floor of one part in 2^24 of RMS(O); with scores beyond what fp32 resolves (max_score > 64) fp32 may use 2
/// * plain_rms_error instead where larger. No element may be off by more than 16 times the larger of the plain run's largest error and the
/// RMS limit: a mean over many rows hides one wrong row. Each limit has one step of the subnormal fp32 numbers (2^-149) on top: no sum in
/// fp32 is finer. LSE: max error <= 1e-5 + 2^-21 * max_score. Any mismatch of non-finite values fails.
Verdict judge(const Problem& problem, const ErrorSums& sums);

/// The same of a layer's rows of y: in every dtype rms_error <= 1.1 * plain_rms_error + a floor of one part in 2^24 of RMS(y), and the LSE,
/// whose Q and K were rounded before, may be off by 2 * the plain run's largest error besides.
Verdict judge_layer(const ErrorSums& sums);

}  // namespace annulus
