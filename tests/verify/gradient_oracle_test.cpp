// SPDX-License-Identifier: Apache-2.0
#include <annulus/verify/gradient_oracle.hpp>

#include <annulus/core/error.hpp>
#include <annulus/verify/random_problem.hpp>
#include <annulus_test.hpp>

#include "memory_source.hpp"
#include "verify/rounding.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace annulus;
using annulus::test::MemorySource;
using annulus::test::scattered_values;

Problem make_problem(std::int64_t seq_len, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim) {
  Problem problem;
  problem.seq_len = seq_len;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.head_dim = head_dim;
  problem.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  return problem;
}

std::vector<RowId> all_rows(const Problem& problem) {
  std::vector<RowId> rows;
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    for (std::int64_t row = 0; row < problem.seq_len; ++row) { rows.push_back({batch, row}); }
  }
  return rows;
}

GradientRows gradients_of_all(const TensorSource& source, const Problem& problem, const Pattern& pattern, int threads = 2) {
  return oracle_gradients(source, problem, pattern, all_rows(problem), {0, problem.kv_heads}, PlainProbabilities::kept, threads);
}

/// One element of one of the inputs.
struct Place {
  Tensor tensor = Tensor::q;
  std::int64_t batch = 0;
  std::int64_t token = 0;
  std::int64_t head = 0;
  std::int64_t dim = 0;
};

/// sum of <dO, O> where one element of an input is moved by `step`. The values are multiples of 2^-23 below 1, so that a step of 2^-7 to
/// 2^-9 leaves them exact in fp32.
double loss(const Problem& problem, const Pattern& pattern, const Place& place, float step) {
  const MemorySource::Value values = scattered_values(7);
  const auto moved = [&](Tensor tensor, std::int64_t batch, std::int64_t token, std::int64_t head, std::int64_t dim) {
    const bool here = tensor == place.tensor && batch == place.batch && token == place.token && head == place.head && dim == place.dim;
    return values(tensor, batch, token, head, dim) + (here ? step : 0.0F);
  };
  const MemorySource source(problem, moved);
  const std::vector<RowId> rows = all_rows(problem);
  const OracleRows oracle = oracle_rows(source, problem, pattern, rows, PlainProbabilities::kept, 1);
  double sum = 0;
  std::size_t element = 0;
  for (const RowId& row : rows) {
    for (std::int64_t head = 0; head < problem.heads; ++head) {
      for (std::int64_t dim = 0; dim < problem.head_dim; ++dim) {
        sum += oracle.out[element++] * static_cast<double>(values(Tensor::dout, row.batch, row.row, head, dim));
      }
    }
  }
  return sum;
}

/// Central differences at two steps, from which the error in the square of the step cancels.
double difference(const Problem& problem, const Pattern& pattern, const Place& place) {
  const auto central = [&](float step) {
    return (loss(problem, pattern, place, step) - loss(problem, pattern, place, -step)) / (2.0 * static_cast<double>(step));
  };
  return (4.0 * central(0x1p-8F) - central(0x1p-7F)) / 3.0;
}

/// The largest difference between the gradients and central differences, over every element of Q, K and V.
double largest_error(const Problem& problem, const Pattern& pattern) {
  const MemorySource source(problem, scattered_values(7));
  const GradientRows found = gradients_of_all(source, problem, pattern);
  double largest = 0;
  for (const auto& [tensor, gradient] : {std::pair{Tensor::q, &found.dq}, {Tensor::k, &found.dk}, {Tensor::v, &found.dv}}) {
    std::size_t element = 0;
    for (const RowId& row : all_rows(problem)) {
      for (std::int64_t head = 0; head < heads_of(problem, tensor); ++head) {
        for (std::int64_t dim = 0; dim < problem.head_dim; ++dim, ++element) {
          const double expected = difference(problem, pattern, {tensor, row.batch, row.row, head, dim});
          const double error = std::abs(gradient->exact[element] - expected);
          if (!(error <= largest)) { largest = error; }
        }
      }
    }
  }
  return largest;
}

/// What remains at steps of 2^-7 of values below 1, whose gradients are of the order of 0.1.
constexpr double kDifferenceError = 1e-8;

struct Case {
  std::string name;
  Problem problem;
  Pattern pattern;
};

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  const auto add = [&](std::string name, const Problem& problem, const Pattern& pattern) {
    cases.push_back({std::move(name), problem, pattern});
  };
  Problem problem = make_problem(5, 2, 1, 3);
  add("dense", problem, dense_pattern(5));
  problem.causal = true;
  add("causal", problem, dense_pattern(5));

  problem = make_problem(7, 2, 2, 2);
  Pattern pattern;
  pattern.branches = {{4, 1}, {7, 3}};
  pattern.head_split = HeadSplit::all;
  for (const Mixing mixing : {Mixing::lse, Mixing::mean, Mixing::sum}) {
    pattern.mixing = mixing;
    add("mixing " + std::string(to_string(mixing)), problem, pattern);
    pattern.scale_by_branches = true;
    add("scaled mixing " + std::string(to_string(mixing)), problem, pattern);
    pattern.scale_by_branches = false;
  }
  pattern.branches = {{5, 2}, {7, 3}};
  for (const Ragged ragged : {Ragged::short_stride, Ragged::wrap, Ragged::truncate, Ragged::dense_tail, Ragged::zero_keys}) {
    for (const Mixing mixing : {Mixing::lse, Mixing::mean}) {
      pattern.ragged = ragged;
      pattern.mixing = mixing;
      add(std::string("ragged ") + std::string(to_string(ragged)), problem, pattern);
    }
  }
  pattern.ragged = Ragged::short_stride;
  pattern.mixing = Mixing::lse;
  pattern.order = SequenceOrder::hilbert;
  add("order hilbert", problem, pattern);
  pattern.order = SequenceOrder::linear;
  pattern.head_split = HeadSplit::first;
  add("a branch for each head", problem, pattern);
  problem.batch = 2;
  problem.seq_len = 5;
  problem.kv_lengths = {3, 1};
  add("kv_lengths", problem, dense_pattern(5));
  problem.scale = -0.75;
  add("a negative scale", problem, dense_pattern(5));
  problem.dropout = {0.25, 3, 0};
  add("dropout", problem, dense_pattern(5));
  return cases;
}

}  // namespace

TEST_CASE("gradients are what differences of the output say") {
  for (const Case& each : small_cases()) {
    INFO(each.name);

    const double error = largest_error(each.problem, each.pattern);

    CHECK(error <= kDifferenceError);
  }
}

TEST_CASE("gradients of random small problems are what differences of the output say") {
  constexpr std::uint64_t kSeed = 4711;
  std::int64_t checked = 0;
  for (std::int64_t number = 0; checked < 12; ++number) {
    RandomCase drawn = random_case(kSeed, number, 1, KernelKind::automatic);
    if (drawn.problem.seq_len > 40) { continue; }
    INFO("seed " << kSeed << ", case " << number << ": " << drawn.describe());
    Problem& problem = drawn.problem;
    problem.batch = 1;
    problem.extra_keys = 0;
    problem.seq_len = std::min<std::int64_t>(problem.seq_len, 6);
    if (!problem.kv_lengths.empty()) { problem.kv_lengths = {std::min(problem.kv_lengths.front(), problem.seq_len)}; }
    problem.head_dim = std::min<std::int64_t>(problem.head_dim, 2);
    problem.dtype = DType::fp32;
    problem.window = {};
    ++checked;

    const double error = largest_error(problem, drawn.pattern);

    CHECK(error <= kDifferenceError);
  }
}

TEST_CASE("the gradient of a row that sees one key is that of its value alone") {
  const Problem problem = make_problem(4, 1, 1, 2);
  Pattern pattern;
  pattern.branches = {{1, 1}};
  const MemorySource source(problem, scattered_values(3));

  const GradientRows found = gradients_of_all(source, problem, pattern);

  for (std::int64_t i = 0; i < std::ssize(found.dq.exact); ++i) {
    CHECK(std::abs(found.dq.exact[i]) < 1e-15);
    CHECK(std::abs(found.dk.exact[i]) < 1e-15);
    CHECK(found.dv.exact[i] == static_cast<double>(scattered_values(3)(Tensor::dout, 0, i / 2, 0, i % 2)));
  }
}

TEST_CASE("a plain run rounds the gradients of scores where its products take no more") {
  Problem problem = make_problem(2, 1, 1, 1);
  problem.dtype = DType::bf16;
  problem.scale = 1.0;
  // K is 1 and -1/2, V 1 and 0, all else 1: with D the gradient of the first score, that of the second is -D, and dQ 3/2 of D.
  const MemorySource source(problem, [](Tensor tensor, std::int64_t, std::int64_t token, std::int64_t, std::int64_t) {
    if (tensor == Tensor::k) { return token == 0 ? 1.0F : -0.5F; }
    return tensor == Tensor::v && token == 1 ? 0.0F : 1.0F;
  });
  const double share = 1.0 / (1.0 + std::exp(-1.5));
  const auto of_score = static_cast<float>(share * (1.0 - share));
  const float once = round_to(DType::bf16, 1.5F * of_score);
  const float twice = round_to(DType::bf16, 1.5F * round_to(DType::bf16, of_score));
  REQUIRE(once != twice);

  for (const auto& [probabilities, expected] : {std::pair{PlainProbabilities::kept, once}, {PlainProbabilities::rounded, twice}}) {
    const GradientRows found = oracle_gradients(source, problem, {}, all_rows(problem), {0, 1}, probabilities, 1);
    CHECK(found.dq.plain[0] == expected);
    CHECK(found.dq.exact[0] == Approx(1.5 * share * (1.0 - share)).epsilon(1e-14));
  }
}

TEST_CASE("the gradient of rows that no branch covers is exactly 0") {
  const Problem problem = make_problem(9, 2, 1, 3);
  Pattern pattern;
  pattern.branches = {{9, 3}};
  const MemorySource source(problem, scattered_values(5));

  const GradientRows found = gradients_of_all(source, problem, pattern);

  for (std::int64_t row = 0; row < problem.seq_len; ++row) {
    if (row % 3 == 0) { continue; }
    for (std::int64_t i = 0; i < 6; ++i) { CHECK(found.dq.exact[row * 6 + i] == 0.0); }
    for (std::int64_t i = 0; i < 3; ++i) {
      CHECK(found.dk.exact[row * 3 + i] == 0.0);
      CHECK(found.dv.exact[row * 3 + i] == 0.0);
    }
  }
}

TEST_CASE("some rows and heads have the gradients that they have among all, on any number of threads") {
  Problem problem = make_problem(37, 6, 3, 5);
  problem.batch = 2;
  problem.causal = true;
  problem.dtype = DType::bf16;
  Pattern pattern;
  pattern.branches = {{8, 1}, {20, 2}};
  pattern.head_split = HeadSplit::all;
  const MemorySource source(problem, scattered_values(11));
  const GradientRows all = gradients_of_all(source, problem, pattern, 1);
  const std::vector<RowId> rows{{1, 20}, {0, 3}, {1, 36}};

  const GradientRows some = oracle_gradients(source, problem, pattern, rows, {1, 2}, PlainProbabilities::kept, 3);

  for (std::int64_t place = 0; place < std::ssize(rows); ++place) {
    const std::int64_t row = rows[static_cast<std::size_t>(place)].batch * problem.seq_len + rows[static_cast<std::size_t>(place)].row;
    for (std::int64_t i = 10; i < 30; ++i) {
      CHECK(some.dq.exact[place * 30 + i] == all.dq.exact[row * 30 + i]);
      CHECK(some.dq.plain[place * 30 + i] == all.dq.plain[row * 30 + i]);
    }
    for (std::int64_t i = 5; i < 15; ++i) {
      CHECK(some.dk.exact[place * 15 + i] == all.dk.exact[row * 15 + i]);
      CHECK(some.dv.plain[place * 15 + i] == all.dv.plain[row * 15 + i]);
    }
  }
}

TEST_CASE("a source without the gradient of O is refused") {
  class Without final : public SourceView {
   public:
    explicit Without(const TensorSource& source) : SourceView(source) {}
    bool has_dout() const override { return false; }
    void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
      viewed().read(tensor, batch, first, count, dtype, out);
    }
  };
  const Problem problem = make_problem(4, 1, 1, 2);
  const MemorySource source(problem, scattered_values(3));

  CHECK_THROWS_AS(gradients_of_all(Without(source), problem, dense_pattern(4)), InvalidArgument);
}
