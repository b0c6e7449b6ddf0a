// SPDX-License-Identifier: Apache-2.0
#include <annulus/verify/compare.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include "memory_source.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using namespace annulus;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// A small problem, the oracle's answer, and that answer as a program's fp32 output.
struct Checked {
  Problem problem;
  std::vector<RowId> rows;
  OracleRows oracle;
  std::vector<float> out;
  std::vector<float> lse;

  ErrorSums sums() const { return compare_rows(problem, rows, out.data(), lse.data(), oracle); }
  Verdict verdict() const { return judge(problem, sums()); }
  std::size_t element(std::size_t row, std::size_t head, std::size_t dim) const { return (row * 2 + head) * 4 + dim; }
};

Checked correct_run() {
  Checked run;
  run.problem.batch = 2;
  run.problem.seq_len = 30;
  run.problem.heads = 2;
  run.problem.kv_heads = 2;
  run.problem.head_dim = 4;
  run.problem.scale = 0.5;
  const test::MemorySource source(run.problem, test::scattered_values(6));
  for (std::int64_t row = 0; row < 30; ++row) { run.rows.push_back({1, row}); }
  Pattern pattern;
  pattern.branches = {{10, 1}, {30, 2}};  // head 1 runs the second branch: its even rows are uncovered
  run.oracle = oracle_rows(source, run.problem, pattern, run.rows, PlainProbabilities::kept, 1);
  run.out.assign(run.oracle.out.begin(), run.oracle.out.end());
  run.lse.assign(run.oracle.lse.begin(), run.oracle.lse.end());
  return run;
}

TEST_CASE("a row that was not compared, or compared twice, is no checked row") {
  const Checked run = correct_run();
  ErrorSums sums = run.sums();
  CHECK_NOTHROW(require_all_compared(run.problem, 30, sums));
  CHECK_THROWS_WITH(require_all_compared(run.problem, 31, sums),
                    test::contains_text("31 rows of 2 heads x head_dim 4 are 248 output elements, and 240 were compared"));
  sums.add(run.sums());
  CHECK_THROWS_AS(require_all_compared(run.problem, 30, sums), AssertionFailure);
}

TEST_CASE("the oracle's own answer passes and uncovered rows are counted") {
  const Checked run = correct_run();

  const ErrorSums sums = run.sums();
  const Verdict verdict = judge(run.problem, sums);

  CHECK(verdict.passed);
  CHECK(verdict.reason.empty());
  CHECK(sums.count == 240);
  CHECK(sums.uncovered == 15);
  CHECK(sums.non_finite_mismatches == 0);
  CHECK(sums.value_count > 0);
}

TEST_CASE("outputs among the subnormal numbers pass when they are rounded exactly and fail when they are off by more") {
  Checked run = correct_run();
  for (double& value : run.oracle.out) { value *= 1e-41; }
  for (std::size_t i = 0; i < run.out.size(); ++i) {
    run.out[i] = static_cast<float>(run.oracle.out[i]);
    run.oracle.plain_out[i] = run.out[i];
  }
  run.oracle.value_squares *= 1e-82;

  CHECK(run.verdict().passed);

  for (float& value : run.out) { value += 4 * std::numeric_limits<float>::denorm_min(); }
  CHECK_FALSE(run.verdict().passed);
}

TEST_CASE("one NaN or infinity fails and is named") {
  const float value = GENERATE(values<float>({kNan, kInfinity, -kInfinity}));
  Checked run = correct_run();
  run.out[run.element(7, 1, 2)] = value;
  run.out[run.element(9, 0, 0)] = value;

  const ErrorSums sums = run.sums();
  const Verdict verdict = judge(run.problem, sums);

  CHECK_FALSE(verdict.passed);
  CHECK(sums.non_finite_mismatches == 2);
  CHECK(verdict.reason.find("batch 1, row 7, head 1, dim 2") != std::string::npos);
  CHECK(std::isfinite(verdict.rms_error));
}

TEST_CASE("an LSE must be minus infinity exactly where the oracle's is") {
  Checked run = correct_run();
  const std::size_t place = GENERATE(std::size_t{4 * 2 + 1}, std::size_t{5 * 2 + 1});  // uncovered, covered
  run.lse[place] = std::isinf(run.lse[place]) ? 0.0F : -kInfinity;

  const Verdict verdict = run.verdict();

  CHECK_FALSE(verdict.passed);
  CHECK(verdict.reason.find("LSE of batch 1, row " + std::to_string(place / 2) + ", head 1") != std::string::npos);
}

TEST_CASE("a positive infinity does not stand for a negative one") {
  Checked run = correct_run();
  run.lse[4 * 2 + 1] = kInfinity;

  CHECK_FALSE(run.verdict().passed);
}

TEST_CASE("one wrong row fails and is named") {
  Checked run = correct_run();
  for (std::size_t dim = 0; dim < 4; ++dim) { run.out[run.element(21, 0, dim)] = run.out[run.element(20, 1, dim)] + 0.25F; }
  run.out[run.element(21, 0, 3)] += 10.0F;

  const Verdict verdict = run.verdict();

  CHECK_FALSE(verdict.passed);
  CHECK(verdict.reason.find("batch 1, row 21, head 0, dim 3") != std::string::npos);
}

TEST_CASE("a wrong LSE fails though the output is right") {
  Checked run = correct_run();
  run.lse[3 * 2] += 1e-4F;

  const Verdict verdict = run.verdict();

  CHECK_FALSE(verdict.passed);
  CHECK(verdict.reason.find("LSE error") != std::string::npos);
  CHECK(verdict.reason.find("batch 1, row 3, head 0") != std::string::npos);
}

TEST_CASE("an fp16 output beyond the dtype must be the infinity it rounds to") {
  Problem problem;
  problem.seq_len = 1;
  problem.heads = problem.kv_heads = 1;
  problem.head_dim = 2;
  problem.dtype = DType::fp16;
  const std::vector<RowId> rows{{0, 0}};
  OracleRows oracle;
  oracle.out = {70000.0, 1.0};
  oracle.plain_out = {kInfinity, 1.0F};
  oracle.lse = {0.0};
  oracle.max_score = {0.0};
  const float lse = 0.0F;
  const std::uint16_t right[] = {0x7c00, 0x3c00};
  const std::uint16_t wrong[] = {0x7bff, 0x3c00};

  CHECK(judge(problem, compare_rows(problem, rows, right, &lse, oracle)).passed);
  CHECK_FALSE(judge(problem, compare_rows(problem, rows, wrong, &lse, oracle)).passed);
}

/// Sums over 100 elements with the given RMS values.
ErrorSums sums_of(double error, double plain_error, double output, double value) {
  ErrorSums sums;
  sums.count = 100;
  sums.error_squares = error * error * 100;
  sums.plain_error_squares = plain_error * plain_error * 100;
  sums.oracle_squares = output * output * 100;
  sums.value_squares = value * value * 50;
  sums.value_count = 50;
  return sums;
}

TEST_CASE("fp32 may err by 2e-6 of the output or of a tenth of the values") {
  Problem problem;

  CHECK(judge(problem, sums_of(1.99e-6, 0, 1, 1)).passed);
  CHECK_FALSE(judge(problem, sums_of(2.01e-6, 0, 1, 1)).passed);
  CHECK(judge(problem, sums_of(1.99e-7, 0, 1e-3, 1)).passed);
  CHECK_FALSE(judge(problem, sums_of(2.01e-7, 0, 1e-3, 1)).passed);
  CHECK(judge(problem, sums_of(0, 0, 0, 0)).passed);
}

TEST_CASE("fp32 may err by twice the plain run where the scores are large") {
  Problem problem;
  ErrorSums sums = sums_of(1.9e-4, 1e-4, 1, 1);
  sums.max_score = 64.0;
  CHECK_FALSE(judge(problem, sums).passed);

  sums.max_score = 65.0;

  CHECK(judge(problem, sums).passed);
  CHECK(std::abs(judge(problem, sums).ratio - 1.9) < 1e-9);
  sums.error_squares *= 1.2;
  CHECK_FALSE(judge(problem, sums).passed);
}

TEST_CASE("16-bit outputs may err by 1.2 times the plain run") {
  Problem problem;
  problem.dtype = GENERATE(DType::fp16, DType::bf16);

  CHECK(judge(problem, sums_of(1.19e-3, 1e-3, 1, 1)).passed);
  CHECK_FALSE(judge(problem, sums_of(1.21e-3, 1e-3, 1, 1)).passed);
  CHECK(judge(problem, sums_of(0.99 * 0x1p-24, 0, 1, 1)).passed);
  CHECK_FALSE(judge(problem, sums_of(1.01 * 0x1p-24, 0, 1, 1)).passed);
}

TEST_CASE("the limit on LSE grows with the largest score") {
  Problem problem;
  ErrorSums sums = sums_of(0, 0, 1, 1);
  sums.max_lse_error = 1.01e-5;
  CHECK_FALSE(judge(problem, sums).passed);

  sums.max_score = 1.0;

  CHECK(judge(problem, sums).passed);
}

TEST_CASE("sums without a number or with a NaN never pass") {
  Problem problem;
  problem.dtype = GENERATE(DType::fp32, DType::bf16);
  const double not_finite = GENERATE(static_cast<double>(kNan), static_cast<double>(kInfinity));

  CHECK_FALSE(judge(problem, ErrorSums{}).passed);
  CHECK_FALSE(judge(problem, sums_of(not_finite, 1e-3, 1, 1)).passed);
  CHECK_FALSE(judge(problem, sums_of(1e-9, not_finite, not_finite, 1)).passed);
}

TEST_CASE("the sums of two halves add to the sums of the whole in either order") {
  Checked run = correct_run();
  run.out[run.element(3, 0, 1)] += 0.5F;
  run.out[run.element(25, 1, 1)] = kNan;
  run.out[run.element(8, 1, 1)] = kNan;
  run.lse[20 * 2] += 0.25F;
  const auto half = [&](std::size_t first, std::size_t count) {
    const auto cut = [&](const auto& all, std::size_t of_row) {
      const auto begin = all.begin() + static_cast<std::ptrdiff_t>(first * of_row);
      return std::decay_t<decltype(all)>(begin, begin + static_cast<std::ptrdiff_t>(count * of_row));
    };
    Checked part = run;
    part.rows = cut(run.rows, 1);
    part.out = cut(run.out, 8);
    part.lse = cut(run.lse, 2);
    part.oracle.out = cut(run.oracle.out, 8);
    part.oracle.plain_out = cut(run.oracle.plain_out, 8);
    part.oracle.lse = cut(run.oracle.lse, 2);
    part.oracle.max_score = cut(run.oracle.max_score, 2);
    return part.sums();
  };
  const ErrorSums whole = run.sums();

  ErrorSums forward = half(0, 13);
  forward.add(half(13, 17));
  ErrorSums backward = half(13, 17);
  backward.add(half(0, 13));

  for (const ErrorSums& sums : {forward, backward}) {
    CHECK(sums.count == whole.count);
    CHECK(std::abs(sums.error_squares - whole.error_squares) <= 1e-12 * whole.error_squares);
    CHECK(std::abs(sums.oracle_squares - whole.oracle_squares) <= 1e-12 * whole.oracle_squares);
    CHECK(sums.max_error == whole.max_error);
    CHECK(std::vector<std::int64_t>(sums.worst, sums.worst + 4) == std::vector<std::int64_t>{1, 3, 0, 1});
    CHECK(std::vector<std::int64_t>(sums.worst_lse, sums.worst_lse + 3) == std::vector<std::int64_t>{1, 20, 0});
    CHECK(sums.non_finite_mismatches == 2);
    CHECK(std::vector<std::int64_t>(sums.first_mismatch, sums.first_mismatch + 4) == std::vector<std::int64_t>{1, 8, 1, 1});
    CHECK(sums.max_score == whole.max_score);
    CHECK(sums.uncovered == whole.uncovered);
  }
}

TEST_CASE("an oracle of other rows is refused") {
  Checked run = correct_run();
  run.rows.pop_back();

  CHECK_THROWS_AS(run.sums(), InvalidArgument);
}

}  // namespace
