// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/problem.hpp>
#include <annulus/verify/gradient_oracle.hpp>
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

/// Sums of the three gradients, from which ranks agree on a verdict of each.
struct GradientSums {
  ErrorSums dq;  ///< of each: count, errors and non-finite values; LSE and V are not looked at
  ErrorSums dk;
  ErrorSums dv;
  double max_score = 0;
  double query_squares = 0;  ///< these as GradientRows
  double key_squares = 0;
  double value_squares = 0;
  double dout_squares = 0;
  std::int64_t query_count = 0;
  std::int64_t key_count = 0;
  void add(const GradientSums& other);
};

/// Gradients of chosen rows, each [row][heads of the tensor that are compared][head_dim] in problem.dtype.
struct FoundGradients {
  const void* dq = nullptr;
  const void* dk = nullptr;
  const void* dv = nullptr;
};

/// Compares the gradients of some KV heads and of all their query heads with the oracle's.
GradientSums compare_gradients(const Problem& problem, std::span<const RowId> rows, const CheckedHeads& kv_heads,
                               const FoundGradients& found, const GradientRows& oracle);

/// A gradient's verdict. rms_error <= 2 * plain_rms_error in fp32 and 1.2 * in 16 bits, and a floor on top where the exact gradient nearly
/// cancels and a plain run happens to hit it: 2^-22, four roundings of fp32, of what one probability of 1 would give, which is RMS(dO) for
/// dV, and for dQ, whose <dO, v> is a sum of head_dim roundings, |scale| head_dim / 2 RMS(dO) RMS(V) RMS(K), for dK the same with Q; times
/// sqrt(group_size) for dK and dV; times max_score / 16 beyond scores of 16, which fp32 resolves the less the larger they are. Elements as
/// in judge().
/// @param tensor  q, k or v: that whose gradient it is
Verdict judge_gradient(const Problem& problem, const GradientSums& sums, Tensor tensor);

/// The same of a layer's rows of y: in every dtype rms_error <= 1.1 * plain_rms_error + a floor of one part in 2^24 of RMS(y), and the LSE,
/// whose Q and K were rounded before, may be off by 2 * the plain run's largest error besides.
Verdict judge_layer(const ErrorSums& sums);

}  // namespace annulus
