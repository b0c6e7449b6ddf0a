// SPDX-License-Identifier: Apache-2.0
#include <annulus/verify/compare.hpp>

#include <annulus/core/error.hpp>
#include <annulus/kernels/dtype.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace annulus {
namespace {

constexpr double kFp32Tolerance = 2e-6;  // of RMS(O), or of a tenth of RMS(V) where O nearly cancels
constexpr double kValueShare = 0.1;
constexpr double kPlainFactor = 1.2;  // 16-bit: of the plain run's error
constexpr double kLayerFactor = 1.1;  // of a layer: the same
constexpr double kLayerLseFactor = 2.0;
constexpr double kFloor = 0x1p-24;      // 16-bit: of RMS(O), for outputs that the plain run happens to hit exactly
constexpr double kFp32Step = 0x1p-149;  // between subnormal fp32 numbers, to which sums in fp32 are rounded however small they are
constexpr double kLargeScore = 64.0;    // from here a rounding of an fp32 score moves its exponential by more than kFp32Tolerance
constexpr double kLargeScoreFactor = 2.0;
constexpr double kElementFactor = 16.0;     // largest errors of two sound runs differ by less; a wrong row is off by far more
constexpr double kGradientFactor = 2.0;     // fp32: of the plain run's error of a gradient
constexpr double kGradientFloor = 0x1p-22;  // of what a probability of 1 gives to it
constexpr double kResolvedScore = 16.0;     // up to here an fp32 score moves its exponential by less than kGradientFloor
constexpr double kLseFloor = 1e-5;
constexpr double kLseShare = 0x1p-21;  // of the largest score
constexpr std::int64_t kLseDim = -1;   // the place of an LSE where a dim would stand

enum class NumberKind { finite, nan, plus_infinity, minus_infinity };

NumberKind kind_of(double value) {
  if (std::isnan(value)) { return NumberKind::nan; }
  if (std::isinf(value)) { return value > 0 ? NumberKind::plus_infinity : NumberKind::minus_infinity; }
  return NumberKind::finite;
}

template <std::size_t kExtent>
bool comes_before(const std::int64_t (&a)[kExtent], const std::int64_t (&b)[kExtent]) {
  return std::lexicographical_compare(std::begin(a), std::end(a), std::begin(b), std::end(b));
}

template <std::size_t kExtent>
void copy_place(const std::int64_t (&from)[kExtent], std::int64_t (&to)[kExtent]) {
  std::copy(std::begin(from), std::end(from), std::begin(to));
}

/// Takes over the larger error; of equal ones that at the earlier place, so that the order of merging does not matter.
template <std::size_t kExtent>
void take_worst(double error, const std::int64_t (&place)[kExtent], double& worst_error, std::int64_t (&worst_place)[kExtent]) {
  if (error > worst_error || (error == worst_error && error > 0 && comes_before(place, worst_place))) {
    worst_error = error;
    copy_place(place, worst_place);
  }
}

void take_mismatches(std::int64_t count, const std::int64_t (&place)[4], ErrorSums& sums) {
  if (count > 0 && (sums.non_finite_mismatches == 0 || comes_before(place, sums.first_mismatch))) {
    copy_place(place, sums.first_mismatch);
  }
  sums.non_finite_mismatches += count;
}

/// Root of a mean; 0 of nothing.
double root_mean(double squares, std::int64_t count) { return count == 0 ? 0.0 : std::sqrt(squares / static_cast<double>(count)); }

/// One element, of which the exact run and the plain one made these. Returns whether it is finite where it should be.
template <class Element>
bool compare_value(Element element, double expected, double plain, const std::int64_t (&place)[4], ErrorSums& sums) {
  const auto found = static_cast<double>(kernels::to_float(element));
  // A finite value beyond the dtype is an infinity of the dtype.
  const NumberKind kind = kind_of(static_cast<double>(kernels::to_float(kernels::from_float<Element>(static_cast<float>(expected)))));
  ++sums.count;
  if (kind_of(found) != kind) {
    take_mismatches(1, place, sums);
    return false;
  }
  if (kind != NumberKind::finite) { return false; }
  const double error = found - expected;
  const double plain_error = plain - expected;
  sums.error_squares += error * error;
  sums.plain_error_squares += plain_error * plain_error;
  sums.oracle_squares += expected * expected;
  sums.max_plain_error = std::max(sums.max_plain_error, std::abs(plain_error));
  take_worst(std::abs(error), place, sums.max_error, sums.worst);
  return true;
}

/// Heads [first, first + count) of a gradient, which has `all` of them.
template <class Element>
ErrorSums compare_gradient(std::span<const RowId> rows, std::int64_t head_dim, std::int64_t first, std::int64_t count, std::int64_t all,
                           const void* found, const GradientOfRows& oracle) {
  ErrorSums sums;
  const auto* element = static_cast<const Element*>(found);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::int64_t head = first; head < first + count; ++head) {
      for (std::int64_t dim = 0; dim < head_dim; ++dim) {
        const std::int64_t at = (static_cast<std::int64_t>(i) * all + head) * head_dim + dim;
        compare_value(*element++, oracle.exact[at], static_cast<double>(oracle.plain[at]), {rows[i].batch, rows[i].row, head, dim}, sums);
      }
    }
  }
  return sums;
}

template <class Element>
ErrorSums compare_elements(const Problem& problem, std::span<const RowId> rows, const CheckedHeads& heads, const Element* out,
                           const float* lse, const OracleRows& oracle) {
  ErrorSums sums;
  add_lse(problem, rows, heads, lse, oracle, sums);
  std::int64_t compared = 0;  // heads of rows
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::int64_t head = heads.first; head < heads.first + heads.count; ++head, ++compared) {
      const std::int64_t row_head = static_cast<std::int64_t>(i) * problem.heads + head;
      for (std::int64_t dim = 0; dim < problem.head_dim; ++dim) {
        const std::int64_t element = row_head * problem.head_dim + dim;
        const double expected = oracle.out[static_cast<std::size_t>(element)];
        const auto plain = static_cast<double>(oracle.plain_out[static_cast<std::size_t>(element)]);
        const bool finite =
            compare_value(out[compared * problem.head_dim + dim], expected, plain, {rows[i].batch, rows[i].row, head, dim}, sums);
        for (std::size_t scale = 0; scale < oracle.scaled_out.size() && finite; ++scale) {
          const double scaled_error = static_cast<double>(oracle.scaled_out[scale][static_cast<std::size_t>(element)]) - expected;
          sums.scaled_error_squares[scale] += scaled_error * scaled_error;
          sums.max_plain_error = std::max(sums.max_plain_error, std::abs(scaled_error));
        }
      }
    }
  }
  sums.value_squares = oracle.value_squares;
  sums.value_count = oracle.value_count;
  return sums;
}

std::string place_name(const std::int64_t (&place)[4]) {
  const std::string where = fmt::format("batch {}, row {}, head {}", place[0], place[1], place[2]);
  return place[3] == kLseDim ? "the LSE of " + where : fmt::format("{}, dim {}", where, place[3]);
}

}  // namespace

void ErrorSums::add(const ErrorSums& other) {
  count += other.count;
  error_squares += other.error_squares;
  plain_error_squares += other.plain_error_squares;
  for (std::size_t scale = 0; scale < scaled_error_squares.size(); ++scale) {
    scaled_error_squares[scale] += other.scaled_error_squares[scale];
  }
  oracle_squares += other.oracle_squares;
  value_squares += other.value_squares;
  value_count += other.value_count;
  take_worst(other.max_error, other.worst, max_error, worst);
  take_worst(other.max_lse_error, other.worst_lse, max_lse_error, worst_lse);
  max_score = std::max(max_score, other.max_score);
  max_plain_error = std::max(max_plain_error, other.max_plain_error);
  max_plain_lse_error = std::max(max_plain_lse_error, other.max_plain_lse_error);
  take_mismatches(other.non_finite_mismatches, other.first_mismatch, *this);
  uncovered += other.uncovered;
}

ErrorSums compare_rows(const Problem& problem, std::span<const RowId> rows, const void* out, const float* lse, const OracleRows& oracle) {
  return compare_rows(problem, rows, {0, problem.heads}, out, lse, oracle);
}

ErrorSums compare_rows(const Problem& problem, std::span<const RowId> rows, const CheckedHeads& heads, const void* out, const float* lse,
                       const OracleRows& oracle) {
  const std::size_t row_heads = rows.size() * static_cast<std::size_t>(problem.heads);
  const std::size_t elements = row_heads * static_cast<std::size_t>(problem.head_dim);
  ANNULUS_EXPECTS(oracle.out.size() == elements && oracle.plain_out.size() == elements && oracle.lse.size() == row_heads &&
                      oracle.max_score.size() == row_heads,
                  "the oracle holds {} output elements; {} rows of {} heads x head_dim {} have {}", oracle.out.size(), rows.size(),
                  problem.heads, problem.head_dim, elements);
  return kernels::with_element(problem.dtype, [&](auto tag) {
    using Element = decltype(tag);
    return compare_elements(problem, rows, heads, static_cast<const Element*>(out), lse, oracle);
  });
}

void add_lse(const Problem& problem, std::span<const RowId> rows, const CheckedHeads& heads, const float* lse, const OracleRows& oracle,
             ErrorSums& sums) {
  std::int64_t compared = 0;  // heads of rows
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::int64_t head = heads.first; head < heads.first + heads.count; ++head, ++compared) {
      const std::int64_t at = static_cast<std::int64_t>(i) * problem.heads + head;
      sums.max_score = std::max(sums.max_score, oracle.max_score[at]);
      if (kind_of(oracle.lse[at]) == NumberKind::minus_infinity) { ++sums.uncovered; }
      const auto found = static_cast<double>(lse[compared]);
      if (kind_of(found) != kind_of(oracle.lse[at])) {
        take_mismatches(1, {rows[i].batch, rows[i].row, head, kLseDim}, sums);
      } else if (kind_of(found) == NumberKind::finite) {
        take_worst(std::abs(found - oracle.lse[at]), {rows[i].batch, rows[i].row, head}, sums.max_lse_error, sums.worst_lse);
        if (!oracle.plain_lse.empty()) {
          sums.max_plain_lse_error = std::max(sums.max_plain_lse_error, std::abs(oracle.plain_lse[at] - oracle.lse[at]));
        }
      }
    }
  }
}

void require_all_compared(const Problem& problem, std::int64_t rows, const ErrorSums& sums) {
  const std::int64_t expected = rows * problem.heads * problem.head_dim;
  ANNULUS_ASSERT(sums.count == expected, "{} rows of {} heads x head_dim {} are {} output elements, and {} were compared", rows,
                 problem.heads, problem.head_dim, expected, sums.count);
}

namespace {

/// The figures of a verdict, but for its limits.
Verdict measure(const ErrorSums& sums) {
  Verdict verdict;
  verdict.rms_error = root_mean(sums.error_squares, sums.count);
  const double scaled_squares = *std::max_element(sums.scaled_error_squares.begin(), sums.scaled_error_squares.end());
  verdict.plain_rms_error = root_mean(std::max(sums.plain_error_squares, scaled_squares), sums.count);
  verdict.ratio = verdict.rms_error == 0 ? 0.0 : verdict.rms_error / verdict.plain_rms_error;
  return verdict;
}

/// Holds the figures against the limits on rms_error and LSE, which are there.
void decide(const ErrorSums& sums, Verdict& verdict) {
  verdict.limit += kFp32Step;
  verdict.element_limit = kElementFactor * std::max(sums.max_plain_error, verdict.limit);

  // Each limit is asked as "not within", so that a NaN fails.
  if (sums.count == 0) {
    verdict.reason = "no output was compared";
  } else if (sums.non_finite_mismatches > 0) {
    verdict.reason = fmt::format("{} values are NaN or infinite where the oracle's are not, or the reverse; the first is {}",
                                 sums.non_finite_mismatches, place_name(sums.first_mismatch));
  } else if (!std::isfinite(verdict.limit)) {
    verdict.reason = "the plain run overflows in this dtype, so that there is nothing to measure the error by";
  } else if (!(verdict.rms_error <= verdict.limit)) {
    verdict.reason = fmt::format("RMS error {:.3e} of the output exceeds {:.3e}; the largest error is {:.3e} at {}", verdict.rms_error,
                                 verdict.limit, sums.max_error, place_name(sums.worst));
  } else if (!(sums.max_error <= verdict.element_limit)) {
    verdict.reason =
        fmt::format("error {:.3e} of one element exceeds {:.3e} at {}", sums.max_error, verdict.element_limit, place_name(sums.worst));
  } else if (!(sums.max_lse_error <= verdict.lse_limit)) {
    verdict.reason = fmt::format("LSE error {:.3e} exceeds {:.3e} at batch {}, row {}, head {}", sums.max_lse_error, verdict.lse_limit,
                                 sums.worst_lse[0], sums.worst_lse[1], sums.worst_lse[2]);
  }
  verdict.passed = verdict.reason.empty();
}

}  // namespace

Verdict judge(const Problem& problem, const ErrorSums& sums) {
  Verdict verdict = measure(sums);
  const double output_rms = root_mean(sums.oracle_squares, sums.count);
  switch (problem.dtype) {
    case DType::fp32:
      verdict.limit = kFp32Tolerance * std::max(output_rms, kValueShare * root_mean(sums.value_squares, sums.value_count));
      if (sums.max_score > kLargeScore) { verdict.limit = std::max(verdict.limit, kLargeScoreFactor * verdict.plain_rms_error); }
      break;
    case DType::fp16:
    case DType::bf16:
      verdict.limit = kPlainFactor * verdict.plain_rms_error + kFloor * output_rms;
      break;
  }
  verdict.lse_limit = kLseFloor + kLseShare * sums.max_score;
  decide(sums, verdict);
  return verdict;
}

void GradientSums::add(const GradientSums& other) {
  dq.add(other.dq);
  dk.add(other.dk);
  dv.add(other.dv);
  max_score = std::max(max_score, other.max_score);
  query_squares += other.query_squares;
  key_squares += other.key_squares;
  value_squares += other.value_squares;
  dout_squares += other.dout_squares;
  query_count += other.query_count;
  key_count += other.key_count;
}

GradientSums compare_gradients(const Problem& problem, std::span<const RowId> rows, const CheckedHeads& kv_heads,
                               const FoundGradients& found, const GradientRows& oracle) {
  GradientSums sums;
  const std::int64_t group = problem.group_size();
  kernels::with_element(problem.dtype, [&](auto tag) {
    using Element = decltype(tag);
    const std::int64_t d = problem.head_dim;
    sums.dq = compare_gradient<Element>(rows, d, kv_heads.first * group, kv_heads.count * group, problem.heads, found.dq, oracle.dq);
    sums.dk = compare_gradient<Element>(rows, d, kv_heads.first, kv_heads.count, problem.kv_heads, found.dk, oracle.dk);
    sums.dv = compare_gradient<Element>(rows, d, kv_heads.first, kv_heads.count, problem.kv_heads, found.dv, oracle.dv);
  });
  sums.max_score = oracle.max_score;
  sums.query_squares = oracle.query_squares;
  sums.key_squares = oracle.key_squares;
  sums.value_squares = oracle.value_squares;
  sums.dout_squares = oracle.dout_squares;
  sums.query_count = oracle.query_count;
  sums.key_count = oracle.key_count;
  return sums;
}

namespace {

/// Of the plain run's error, that a gradient may have.
double gradient_factor(DType dtype) {
  switch (dtype) {
    case DType::fp32:
      return kGradientFactor;
    case DType::fp16:
    case DType::bf16:
      break;
  }
  return kPlainFactor;
}

}  // namespace

Verdict judge_gradient(const Problem& problem, const GradientSums& sums, Tensor tensor) {
  const double dout = root_mean(sums.dout_squares, sums.query_count);
  const double group = std::sqrt(static_cast<double>(problem.group_size()));
  // The first products of a sum take part in the roundings of all later ones: the error grows with their number and not with its root.
  const double of_scores =
      std::abs(problem.scale) * static_cast<double>(problem.head_dim) / 2 * dout * root_mean(sums.value_squares, sums.key_count);
  const ErrorSums* errors = &sums.dq;
  double size = of_scores * root_mean(sums.key_squares, sums.key_count);
  if (tensor == Tensor::k) {
    errors = &sums.dk;
    size = of_scores * root_mean(sums.query_squares, sums.query_count) * group;
  } else if (tensor == Tensor::v) {
    errors = &sums.dv;
    size = dout * group;
  }
  Verdict verdict = measure(*errors);
  verdict.limit =
      gradient_factor(problem.dtype) * verdict.plain_rms_error + kGradientFloor * size * std::max(1.0, sums.max_score / kResolvedScore);
  decide(*errors, verdict);
  return verdict;
}

Verdict judge_layer(const ErrorSums& sums) {
  Verdict verdict = measure(sums);
  verdict.limit = kLayerFactor * verdict.plain_rms_error + kFloor * root_mean(sums.oracle_squares, sums.count);
  verdict.lse_limit = kLseFloor + kLseShare * sums.max_score + kLayerLseFactor * sums.max_plain_lse_error;
  decide(sums, verdict);
  return verdict;
}

}  // namespace annulus
