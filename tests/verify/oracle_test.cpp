// SPDX-License-Identifier: Apache-2.0
#include <annulus/verify/oracle.hpp>

#include <annulus/core/error.hpp>
#include <annulus/kernels/philox.hpp>
#include <annulus/pattern/permutation.hpp>
#include <annulus/verify/random_problem.hpp>
#include <annulus_test.hpp>

#include "memory_source.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace {

using namespace annulus;
using annulus::test::MemorySource;
using annulus::test::scattered_values;
using annulus::test::token_number_values;

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

Problem make_problem(std::int64_t seq_len, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim) {
  Problem problem;
  problem.seq_len = seq_len;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.head_dim = head_dim;
  problem.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  return problem;
}

Pattern make_pattern(std::vector<Branch> branches, OffsetRule offset = OffsetRule::group) {
  Pattern pattern;
  pattern.branches = std::move(branches);
  pattern.offset = offset;
  return pattern;
}

std::vector<RowId> all_rows(const Problem& problem) {
  std::vector<RowId> rows;
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    for (std::int64_t row = 0; row < problem.seq_len; ++row) { rows.push_back({batch, row}); }
  }
  return rows;
}

OracleRows oracle_of_all(const MemorySource& source, const Problem& problem, const Pattern& pattern, int threads = 2) {
  return oracle_rows(source, problem, pattern, all_rows(problem), PlainProbabilities::kept, threads);
}

/// Outputs of one head of a problem of head_dim 1.
std::vector<double> head_outputs(const Problem& problem, const OracleRows& rows, std::int64_t head) {
  std::vector<double> outputs;
  for (std::int64_t row = 0; row < problem.seq_len; ++row) {
    outputs.push_back(rows.out[static_cast<std::size_t>(row * problem.heads + head)]);
  }
  return outputs;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) { return std::numeric_limits<double>::infinity(); }
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) { continue; }
    const double difference = std::abs(a[i] - b[i]);
    if (!(difference <= largest)) { largest = difference; }
  }
  return largest;
}

/// The draw of Philox for a key of a query, of numbers below 2^32, is below the probability.
bool is_dropped(const kernels::Dropout& dropout, std::int64_t batch, std::int64_t head, std::int64_t query, std::int64_t key) {
  const auto words_of = [](std::int64_t first, std::int64_t third, std::array<std::uint32_t, 2> under) {
    const auto of = [](std::int64_t number) { return static_cast<std::uint32_t>(number); };
    kernels::PhiloxWords<1> words{{{of(first)}, {0}, {of(third)}, {0}}};
    kernels::philox4x32_10(words, under);
    return words;
  };
  const auto stream = words_of(batch, head, {static_cast<std::uint32_t>(dropout.seed), static_cast<std::uint32_t>(dropout.seed >> 32)});
  const auto draws = words_of(key / 4, query, {stream[0][0], stream[1][0]});
  return static_cast<double>(draws[static_cast<std::size_t>(key % 4)][0]) <= dropout.probability * 0x1p32 - 0.5;
}

/// The operator built the other way round: the rows of every segment are listed, s*w + o + t*r for t = 0, 1, ..., and each row's keys are
/// gathered into one list per branch.
struct Listed {
  std::vector<double> out;
  std::vector<double> lse;
};

Listed attention_by_lists(const MemorySource& source, const Problem& problem, const Pattern& pattern) {
  const std::int64_t heads = problem.heads;
  const std::int64_t head_dim = problem.head_dim;
  const auto branches = static_cast<std::int64_t>(pattern.branches.size());
  const Permutation order(pattern.order, problem.seq_len);
  const auto load = [&](Tensor tensor, std::int64_t batch) {
    const bool extra = tensor == Tensor::k_extra || tensor == Tensor::v_extra;
    const std::int64_t tokens = extra ? problem.extra_keys : problem.seq_len;
    const std::int64_t row_elements = (tensor == Tensor::q ? heads : problem.kv_heads) * head_dim;
    const std::int64_t count = tokens * row_elements;
    std::vector<float> values(static_cast<std::size_t>(count));
    kernels::with_element(problem.dtype, [&](auto tag) {
      std::vector<decltype(tag)> raw(values.size());
      for (std::int64_t position = 0; position < tokens; ++position) {
        const std::int64_t row = extra ? position : order.row_at(position);
        source.read(tensor, batch, row, 1, problem.dtype, raw.data() + position * row_elements);
      }
      std::transform(raw.begin(), raw.end(), values.begin(), [](auto element) { return kernels::to_float(element); });
    });
    return std::vector<double>(values.begin(), values.end());
  };
  std::vector<std::int64_t> group_begin(static_cast<std::size_t>(branches) + 1, 0);
  for (std::int64_t g = 0; g < branches; ++g) {
    const std::int64_t spare = heads % branches;
    const bool larger = pattern.head_split == HeadSplit::first ? g < spare : branches - 1 - g < spare;
    group_begin[static_cast<std::size_t>(g) + 1] = group_begin[static_cast<std::size_t>(g)] + heads / branches + (larger ? 1 : 0);
  }

  Listed result;
  result.out.assign(static_cast<std::size_t>(problem.batch * problem.seq_len * heads * head_dim), 0.0);
  result.lse.assign(static_cast<std::size_t>(problem.batch * problem.seq_len * heads), kMinusInfinity);
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    const auto q = load(Tensor::q, batch);
    auto k = load(Tensor::k, batch);
    auto v = load(Tensor::v, batch);
    // Extra keys are those behind the last token.
    const auto append = [](std::vector<double>& to, const std::vector<double>& more) { to.insert(to.end(), more.begin(), more.end()); };
    append(k, load(Tensor::k_extra, batch));
    append(v, load(Tensor::v_extra, batch));
    std::vector<std::int64_t> extra_keys;
    for (std::int64_t key = 0; key < problem.extra_keys; ++key) { extra_keys.push_back(problem.seq_len + key); }
    for (std::int64_t head = 0; head < heads; ++head) {
      const std::int64_t kv_head = head / (heads / problem.kv_heads);
      std::vector<std::vector<std::vector<std::int64_t>>> keys(static_cast<std::size_t>(problem.seq_len));  // [row][covering branch]
      for (std::int64_t g = 0; g < branches; ++g) {
        const bool runs = pattern.head_split == HeadSplit::all ||
                          (head >= group_begin[static_cast<std::size_t>(g)] && head < group_begin[static_cast<std::size_t>(g) + 1]);
        if (!runs) { continue; }
        const auto [w, r] = pattern.branches[static_cast<std::size_t>(g)];
        for (std::int64_t s = 0; s * w < problem.seq_len; ++s) {
          std::int64_t offset = 0;
          if (pattern.offset == OffsetRule::group) { offset = g % r; }
          if (pattern.offset == OffsetRule::group_plus_segment) { offset = (g + s) % r; }
          if (pattern.offset == OffsetRule::segment) { offset = s % r; }
          if (pattern.offset == OffsetRule::head) { offset = kv_head % r; }
          if (pattern.offset == OffsetRule::head_block) { offset = kv_head / ((problem.kv_heads + r - 1) / r); }
          std::vector<std::int64_t> members;
          const bool whole_segment = (s + 1) * w <= problem.seq_len;
          const std::int64_t first = pattern.ragged == Ragged::dense_tail && !whole_segment ? 0 : offset;
          const std::int64_t step = pattern.ragged == Ragged::dense_tail && !whole_segment ? 1 : r;
          for (std::int64_t row = s * w + first; row < std::min((s + 1) * w, problem.seq_len); row += step) { members.push_back(row); }
          if (pattern.ragged == Ragged::truncate) {
            // As many as fit into whole strides.
            std::int64_t whole = 0;
            while ((whole + 1) * r <= std::min((s + 1) * w, problem.seq_len) - s * w) { ++whole; }
            members.resize(std::min(members.size(), static_cast<std::size_t>(whole)));
          }
          if (pattern.ragged == Ragged::wrap) {
            members.clear();
            const std::int64_t length = std::min((s + 1) * w, problem.seq_len) - s * w;
            for (std::int64_t t = 0; t < (length + r - 1) / r; ++t) { members.push_back(s * w + (offset + t * r) % length); }
          }
          std::int64_t padding = 0;
          if (pattern.ragged == Ragged::zero_keys && !problem.causal) {
            // The slots of a segment at the sequence's start, less what there is.
            for (std::int64_t slot = 0; slot < std::min(w, problem.seq_len); slot += r) { ++padding; }
            padding -= static_cast<std::int64_t>(members.size());
          }
          for (const std::int64_t row : members) {
            std::vector<std::int64_t> seen(static_cast<std::size_t>(padding), -1);  // -1: a key of zeros
            for (const std::int64_t key : members) {
              if ((!problem.causal || key <= row) && key < problem.kv_length(batch)) { seen.push_back(key); }
            }
            if (!seen.empty()) { keys[static_cast<std::size_t>(row)].push_back(seen); }
          }
        }
      }
      for (std::int64_t row = 0; row < problem.seq_len; ++row) {
        auto& lists = keys[static_cast<std::size_t>(row)];
        const auto covering = static_cast<double>(lists.size());
        if (lists.empty()) {
          if (extra_keys.empty()) { continue; }
          lists.push_back({});
        }
        if (pattern.mixing == Mixing::lse) {
          for (std::size_t i = 1; i < lists.size(); ++i) { lists[0].insert(lists[0].end(), lists[i].begin(), lists[i].end()); }
          lists.resize(1);
        }
        for (auto& list : lists) { list.insert(list.end(), extra_keys.begin(), extra_keys.end()); }
        double denominator_of_all = 0;
        const std::int64_t row_head = (batch * problem.seq_len + order.row_at(row)) * heads + head;
        for (const auto& list : lists) {
          double denominator = 0;
          double of_extra_keys = 0;
          std::vector<double> numerator(static_cast<std::size_t>(head_dim), 0.0);
          for (const std::int64_t key : list) {
            if (key < 0) {
              denominator += 1;
              continue;
            }
            double score = 0;
            for (std::int64_t d = 0; d < head_dim; ++d) {
              score += q[static_cast<std::size_t>((row * heads + head) * head_dim + d)] *
                       k[static_cast<std::size_t>((key * problem.kv_heads + kv_head) * head_dim + d)];
            }
            const double weight = std::exp(problem.scale * score);  // the values of these tests need no maximum
            denominator += weight;
            of_extra_keys += key >= problem.seq_len ? weight : 0.0;
            const double kept = is_dropped(problem.dropout, batch, head, row, key) ? 0.0 : weight / (1.0 - problem.dropout.probability);
            for (std::int64_t d = 0; d < head_dim; ++d) {
              numerator[static_cast<std::size_t>(d)] +=
                  kept * v[static_cast<std::size_t>((key * problem.kv_heads + kv_head) * head_dim + d)];
            }
          }
          denominator_of_all += &list == &lists.front() ? denominator : denominator - of_extra_keys;
          const double share = (pattern.mixing == Mixing::mean ? 1.0 / std::max(1.0, covering) : 1.0) /
                               (pattern.scale_by_branches ? static_cast<double>(branches) : 1.0);
          for (std::int64_t d = 0; d < head_dim; ++d) {
            result.out[static_cast<std::size_t>(row_head * head_dim + d)] += share * numerator[static_cast<std::size_t>(d)] / denominator;
          }
        }
        result.lse[static_cast<std::size_t>(row_head)] = std::log(denominator_of_all);
      }
    }
  }
  return result;
}

TEST_CASE("a segment of a permuted sequence averages the tokens that stand in it, each at its place in the input") {
  const auto outputs_in = [](SequenceOrder order, std::int64_t seq_len) {
    Problem problem = make_problem(seq_len, 1, 1, 1);
    Pattern pattern = make_pattern({{4, 1}});
    pattern.order = order;
    const MemorySource source(problem, token_number_values());
    return head_outputs(problem, oracle_of_all(source, problem, pattern), 0);
  };

  // Segments {0 4 2 6}, {1 5 3 7}.
  CHECK(outputs_in(SequenceOrder::bit_reversal, 8) == std::vector<double>{3, 4, 3, 4, 3, 4, 3, 4});
  // {0 1 5 4}, {8 12 13 9}, {10 14 15 11}, {7 6 2 3}: the quarters of a square.
  CHECK(outputs_in(SequenceOrder::hilbert, 16) ==
        std::vector<double>{2.5, 2.5, 4.5, 4.5, 2.5, 2.5, 4.5, 4.5, 10.5, 10.5, 12.5, 12.5, 10.5, 10.5, 12.5, 12.5});
  // {0 1 14 15}, {3 2 13 12}, {4 7 8 11}, {5 6 9 10}: every mean is that of the whole.
  CHECK(outputs_in(SequenceOrder::hilbert_inverse, 16) == std::vector<double>(16, 7.5));
  // {0 1 5 4}, {8 9 7 6}, {2 3}: cells of a square of side 4, those past the ninth left out.
  CHECK(outputs_in(SequenceOrder::hilbert, 10) == std::vector<double>{2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 7.5, 7.5, 7.5, 7.5});
}

TEST_CASE("an order of the sequence and a causal mask do not go together") {
  Problem problem = make_problem(8, 1, 1, 1);
  problem.causal = true;
  Pattern pattern = make_pattern({{4, 1}});
  pattern.order = SequenceOrder::hilbert;
  const MemorySource source(problem, token_number_values());
  CHECK_THROWS_AS(oracle_of_all(source, problem, pattern), InvalidArgument);
}

TEST_CASE("a dilated segment averages its own selected tokens and leaves the others uncovered") {
  Problem problem = make_problem(16, 1, 1, 1);
  const MemorySource source(problem, token_number_values());
  const Pattern pattern = make_pattern({{8, 2}});

  const OracleRows full = oracle_of_all(source, problem, pattern);
  problem.causal = true;
  const OracleRows causal = oracle_of_all(source, problem, pattern);

  CHECK(head_outputs(problem, full, 0) == std::vector<double>{3, 0, 3, 0, 3, 0, 3, 0, 11, 0, 11, 0, 11, 0, 11, 0});
  CHECK(head_outputs(problem, causal, 0) == std::vector<double>{0, 0, 1, 0, 2, 0, 3, 0, 8, 0, 9, 0, 10, 0, 11, 0});
  for (std::size_t row = 0; row < 16; ++row) { CHECK(full.lse[row] == (row % 2 == 0 ? std::log(4.0) : kMinusInfinity)); }
}

TEST_CASE("keys of zeros weigh like any key of score 0 and add nothing") {
  Problem problem = make_problem(5, 1, 1, 1);
  const MemorySource source(problem, token_number_values());  // all scores are 0
  Pattern pattern = make_pattern({{4, 1}});
  pattern.ragged = Ragged::zero_keys;

  const OracleRows rows = oracle_of_all(source, problem, pattern);
  problem.causal = true;
  const OracleRows causal = oracle_of_all(source, problem, pattern);

  CHECK(head_outputs(problem, rows, 0) == std::vector<double>{1.5, 1.5, 1.5, 1.5, 1});
  CHECK(rows.lse[4] == std::log(4.0));
  CHECK(head_outputs(problem, causal, 0).back() == 4);
  CHECK(causal.lse[4] == 0);

  problem.causal = false;
  pattern.branches = {{100, 2}, {4, 3}};  // cut to the sequence: tokens 0, 2, 4; then token 1 and an empty slot
  pattern.head_split = HeadSplit::all;
  CHECK(head_outputs(problem, oracle_of_all(source, problem, pattern), 0) == std::vector<double>{2, 0.5, 2, 0, 2});
}

TEST_CASE("keys past a batch entry's length are seen by nobody, rows past it are computed like any other") {
  Problem problem = make_problem(6, 1, 1, 1);
  problem.batch = 2;
  problem.kv_lengths = {4, 1};
  const MemorySource source(problem, token_number_values());
  const OracleRows rows = oracle_of_all(source, problem, make_pattern({{3, 1}}));
  CHECK(rows.out == std::vector<double>{1, 1, 1, 3, 3, 3, 0, 0, 0, 0, 0, 0});
  CHECK(rows.lse[5] == 0);
  CHECK(rows.lse[8] == 0);
  CHECK(rows.lse[9] == kMinusInfinity);  // all keys of its segment are hidden
  problem.causal = true;
  CHECK(oracle_of_all(source, problem, make_pattern({{6, 1}})).out == std::vector<double>{0, 0.5, 1, 1.5, 1.5, 1.5, 0, 0, 0, 0, 0, 0});
}

TEST_CASE("extra keys are seen by every row: once in one softmax, by each branch under mean and sum, alone where nothing covers") {
  Problem problem = make_problem(4, 1, 1, 1);
  problem.extra_keys = 1;
  const MemorySource source(problem, token_number_values());
  Pattern pattern = make_pattern({{4, 2}, {2, 2}}, OffsetRule::segment);  // tokens 0 and 2; 0 by itself and 3 by itself
  pattern.head_split = HeadSplit::all;
  const auto rows_of = [&](Mixing mixing) {
    pattern.mixing = mixing;
    return oracle_of_all(source, problem, pattern);
  };

  // Row 0 sees {0, 2} and {0}, row 1 nothing, row 2 {0, 2}, row 3 {3}; and all see the extra key, of value 100.
  const OracleRows lse = rows_of(Mixing::lse);
  CHECK(largest_difference(head_outputs(problem, lse, 0), {102.0 / 4, 100, 102.0 / 3, 103.0 / 2}) < 1e-13);
  CHECK(largest_difference(lse.lse, {std::log(4.0), 0, std::log(3.0), std::log(2.0)}) < 1e-15);
  const OracleRows mean = rows_of(Mixing::mean);
  CHECK(largest_difference(head_outputs(problem, mean, 0), {(102.0 / 3 + 50) / 2, 100, 102.0 / 3, 103.0 / 2}) < 1e-13);
  CHECK(largest_difference(mean.lse, lse.lse) < 1e-15);
  CHECK(largest_difference(head_outputs(problem, rows_of(Mixing::sum), 0), {102.0 / 3 + 50, 100, 102.0 / 3, 103.0 / 2}) < 1e-13);

  // Neither a causal mask nor lengths of keys hide them.
  problem.causal = true;
  problem.kv_lengths = {1};
  CHECK(largest_difference(head_outputs(problem, rows_of(Mixing::lse), 0), {100.0 / 3, 100, 50, 100}) < 1e-13);
}

TEST_CASE("a dense tail has every token, whole segments their stride") {
  const Problem problem = make_problem(7, 1, 1, 1);
  const MemorySource source(problem, token_number_values());
  Pattern pattern = make_pattern({{4, 2}});
  pattern.ragged = Ragged::dense_tail;
  CHECK(head_outputs(problem, oracle_of_all(source, problem, pattern), 0) == std::vector<double>{1, 0, 1, 0, 5, 5, 5});
  pattern.branches = {{8, 3}};  // no whole segment at all
  CHECK(head_outputs(problem, oracle_of_all(source, problem, pattern), 0) == std::vector<double>(7, 3.0));
}

TEST_CASE("a row past the end of its segment wraps to its start, and sees what is not later") {
  Problem problem = make_problem(13, 1, 1, 1);
  const MemorySource source(problem, token_number_values());
  Pattern pattern = make_pattern({{10, 3}}, OffsetRule::segment);
  pattern.ragged = Ragged::wrap;
  // Segment 0 holds 0, 3, 6, 9; segment 1, of three tokens, 11.
  CHECK(head_outputs(problem, oracle_of_all(source, problem, pattern), 0) ==
        std::vector<double>{4.5, 0, 0, 4.5, 0, 0, 4.5, 0, 0, 4.5, 0, 11, 0});
  pattern.branches = {{13, 3}, {10, 3}};  // branch 1, offset 1: 0, 1, 4, 7, and 11 again
  pattern.offset = OffsetRule::group;
  problem.heads = problem.kv_heads = 2;
  const MemorySource two_heads(problem, token_number_values());
  CHECK(head_outputs(problem, oracle_of_all(two_heads, problem, pattern), 1) ==
        std::vector<double>{3, 3, 0, 0, 3, 0, 0, 3, 0, 0, 0, 11, 0});
  problem.causal = true;
  CHECK(head_outputs(problem, oracle_of_all(two_heads, problem, pattern), 1) ==
        std::vector<double>{0, 0.5, 0, 0, 5.0 / 3, 0, 0, 3, 0, 0, 0, 11, 0});
}

TEST_CASE("group-plus-segment moves the selected tokens of the second segment by one") {
  const Problem problem = make_problem(16, 1, 1, 1);
  const MemorySource source(problem, token_number_values());

  const OracleRows rows = oracle_of_all(source, problem, make_pattern({{8, 2}}, OffsetRule::group_plus_segment));

  CHECK(head_outputs(problem, rows, 0) == std::vector<double>{3, 0, 3, 0, 3, 0, 3, 0, 0, 12, 0, 12, 0, 12, 0, 12});
}

TEST_CASE("the offset rules select the tokens their names say") {
  const Problem problem = make_problem(10, 4, 2, 1);  // KV head 0 serves heads 0 and 1, KV head 1 heads 2 and 3
  const MemorySource source(problem, token_number_values());
  const auto outputs = [&](OffsetRule rule, std::int64_t head) {
    Pattern pattern = make_pattern({{10, 3}}, rule);
    return head_outputs(problem, oracle_of_all(source, problem, pattern), head);
  };

  CHECK(outputs(OffsetRule::head, 0) == std::vector<double>{4.5, 0, 0, 4.5, 0, 0, 4.5, 0, 0, 4.5});
  CHECK(outputs(OffsetRule::head, 1) == outputs(OffsetRule::head, 0));
  CHECK(outputs(OffsetRule::head, 2) == std::vector<double>{0, 4, 0, 0, 4, 0, 0, 4, 0, 0});
  CHECK(outputs(OffsetRule::head, 3) == outputs(OffsetRule::head, 2));
  CHECK(outputs(OffsetRule::group, 3) == outputs(OffsetRule::head, 0));

  const Pattern segments = make_pattern({{4, 2}}, OffsetRule::segment);
  CHECK(head_outputs(problem, oracle_of_all(source, problem, segments), 0) == std::vector<double>{1, 0, 1, 0, 0, 6, 0, 6, 8, 0});
}

TEST_CASE("spare heads go to the first or the last branches, and a branch may have no head") {
  // Branch g has segments of 2^g tokens, so that LSE tells which branch a head runs.
  const auto branch_of_heads = [](std::int64_t heads, HeadSplit split) {
    const Problem problem = make_problem(8, heads, 1, 1);
    const MemorySource source(problem, token_number_values());
    Pattern pattern = make_pattern({{1, 1}, {2, 1}, {4, 1}});
    pattern.head_split = split;
    const OracleRows rows = oracle_of_all(source, problem, pattern);
    std::vector<std::int64_t> branches;
    for (std::int64_t head = 0; head < heads; ++head) {
      branches.push_back(std::lround(rows.lse[static_cast<std::size_t>(head)] / std::log(2.0)));
    }
    return branches;
  };

  CHECK(branch_of_heads(8, HeadSplit::first) == std::vector<std::int64_t>{0, 0, 0, 1, 1, 1, 2, 2});
  CHECK(branch_of_heads(8, HeadSplit::last) == std::vector<std::int64_t>{0, 0, 1, 1, 1, 2, 2, 2});
  CHECK(branch_of_heads(2, HeadSplit::first) == std::vector<std::int64_t>{0, 1});
  CHECK(branch_of_heads(2, HeadSplit::last) == std::vector<std::int64_t>{1, 2});
}

TEST_CASE("branches mix as one softmax, as a mean over the covering ones, or as a sum") {
  const Problem problem = make_problem(4, 1, 1, 1);
  const MemorySource source(problem, token_number_values());
  Pattern pattern = make_pattern({{2, 1}, {4, 2}});  // branch 1 has offset 1: tokens 1 and 3
  pattern.head_split = HeadSplit::all;
  const auto rows_of = [&](Mixing mixing, bool scaled) {
    pattern.mixing = mixing;
    pattern.scale_by_branches = scaled;
    return oracle_of_all(source, problem, pattern);
  };

  // Row 1 sees {0, 1} and {1, 3}: token 1 counts twice. Row 0 sees {0, 1} alone.
  const OracleRows lse = rows_of(Mixing::lse, false);
  CHECK(head_outputs(problem, lse, 0) == std::vector<double>{0.5, 1.25, 2.5, 2.25});
  CHECK(lse.lse == std::vector<double>{std::log(2.0), std::log(4.0), std::log(2.0), std::log(4.0)});
  const OracleRows mean = rows_of(Mixing::mean, false);
  CHECK(head_outputs(problem, mean, 0) == std::vector<double>{0.5, 1.25, 2.5, 2.25});
  CHECK(largest_difference(mean.lse, lse.lse) < 1e-15);
  CHECK(head_outputs(problem, rows_of(Mixing::sum, false), 0) == std::vector<double>{0.5, 2.5, 2.5, 4.5});
  const OracleRows scaled = rows_of(Mixing::sum, true);
  CHECK(head_outputs(problem, scaled, 0) == std::vector<double>{0.25, 1.25, 1.25, 2.25});
  CHECK(largest_difference(scaled.lse, lse.lse) < 1e-15);
}

TEST_CASE("three tokens give the softmax worked out by hand") {
  Problem problem = make_problem(3, 1, 1, 1);
  problem.scale = 2.0;
  problem.causal = true;
  const MemorySource source(problem, [](Tensor tensor, std::int64_t, std::int64_t token, std::int64_t, std::int64_t) {
    constexpr float kQuery[] = {1.0F, -1.0F, 0.5F};
    constexpr float kKey[] = {0.5F, 1.0F, -2.0F};
    constexpr float kValue[] = {1.0F, 10.0F, 100.0F};
    return tensor == Tensor::q ? kQuery[token] : (tensor == Tensor::k ? kKey[token] : kValue[token]);
  });

  const OracleRows rows = oracle_of_all(source, problem, {});

  // Scores: row 0: 1; row 1: -1, -2; row 2: 0.5, 1, -2.
  const double e = std::exp(1.0);
  const double weights[] = {std::exp(0.5), e, std::exp(-2.0)};
  CHECK(largest_difference(rows.out, {1.0, (e + 10.0) / (e + 1.0),
                                      (weights[0] + 10.0 * weights[1] + 100.0 * weights[2]) / (weights[0] + weights[1] + weights[2])}) <
        1e-13);
  CHECK(largest_difference(rows.lse, {1.0, std::log(std::exp(-1.0) + std::exp(-2.0)), std::log(weights[0] + weights[1] + weights[2])}) <
        1e-14);
  CHECK(rows.max_score == std::vector<double>{1.0, 2.0, 2.0});
}

TEST_CASE("one token attends itself, whatever the scale") {
  Problem problem = make_problem(1, 2, 1, 3);
  problem.scale = GENERATE(0.0, 0.5, -3.0);
  const MemorySource source(problem, scattered_values(5));

  const OracleRows rows = oracle_of_all(source, problem, make_pattern({{100, 1}}));

  for (std::int64_t head = 0; head < 2; ++head) {
    for (std::int64_t dim = 0; dim < 3; ++dim) {
      CHECK(rows.out[static_cast<std::size_t>(head * 3 + dim)] == static_cast<double>(scattered_values(5)(Tensor::v, 0, 0, 0, dim)));
    }
  }
}

TEST_CASE("an empty pattern is plain attention") {
  Problem problem = make_problem(77, 4, 2, 9);
  problem.batch = 2;
  problem.causal = GENERATE(false, true);
  const MemorySource source(problem, scattered_values(11));

  const OracleRows rows = oracle_of_all(source, problem, {});
  const Listed expected = attention_by_lists(source, problem, dense_pattern(problem.seq_len));

  CHECK(largest_difference(rows.out, expected.out) < 1e-13);
  CHECK(largest_difference(rows.lse, expected.lse) < 1e-13);
}

TEST_CASE("random problems give what listing each segment's rows gives") {
  const std::uint64_t seed = 20240601;
  for (std::int64_t number = 0; number < 150; ++number) {
    RandomCase random = random_case(seed, number, std::nullopt);
    random.problem.head_dim = std::min<std::int64_t>(random.problem.head_dim, 20);
    INFO("seed " << seed << ", case " << number << ": " << random.describe());
    const MemorySource source(random.problem, scattered_values(random.data_seed));

    const OracleRows rows = oracle_of_all(source, random.problem, random.pattern);
    const Listed expected = attention_by_lists(source, random.problem, random.pattern);

    CHECK(largest_difference(rows.out, expected.out) < 1e-12);
    CHECK(largest_difference(rows.lse, expected.lse) < 1e-12);
  }
}

TEST_CASE("the plain run errs by its dtype's rounding and no more") {
  Problem problem = make_problem(200, 2, 2, 32);
  problem.dtype = GENERATE(DType::fp32, DType::fp16, DType::bf16);
  const PlainProbabilities probabilities =
      GENERATE(PlainProbabilities::kept, PlainProbabilities::rounded, PlainProbabilities::rounded_at_scales);
  const MemorySource source(problem, scattered_values(3));

  const OracleRows rows = oracle_rows(source, problem, {}, all_rows(problem), probabilities, 2);

  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < rows.out.size(); ++i) {
    error += std::pow(static_cast<double>(rows.plain_out[i]) - rows.out[i], 2);
    size += std::pow(rows.out[i], 2);
  }
  const double relative = std::sqrt(error / size);
  // Half a unit of the last place, over sqrt(3) for evenly spread errors, and about that again for each source of rounding.
  const double unit = problem.dtype == DType::fp32 ? 0x1p-24 : (problem.dtype == DType::fp16 ? 0x1p-11 : 0x1p-8);
  CHECK(relative > 0.1 * unit);
  CHECK(relative < (problem.dtype == DType::fp32 ? 16.0 : 1.5) * unit);
}

TEST_CASE("rounded probabilities add to the plain run's error and leave the oracle alone") {
  Problem problem = make_problem(300, 1, 1, 64);
  problem.dtype = DType::bf16;
  problem.scale = 1.0;
  const MemorySource source(problem, scattered_values(8));

  const OracleRows kept = oracle_rows(source, problem, {}, all_rows(problem), PlainProbabilities::kept, 1);
  const OracleRows rounded = oracle_rows(source, problem, {}, all_rows(problem), PlainProbabilities::rounded, 1);

  const auto error_squares = [](const OracleRows& rows) {
    double sum = 0;
    for (std::size_t i = 0; i < rows.out.size(); ++i) { sum += std::pow(static_cast<double>(rows.plain_out[i]) - rows.out[i], 2); }
    return sum;
  };
  CHECK(kept.out == rounded.out);
  CHECK(error_squares(rounded) > 1.05 * error_squares(kept));
}

TEST_CASE("plain runs at other scales differ where a few roundings matter, and are alike where many do") {
  // Largest and smallest RMS error of all runs, the unscaled one among them.
  const auto range_of = [](std::int64_t seq_len) {
    Problem problem = make_problem(seq_len, 1, 1, 64);
    problem.dtype = DType::bf16;
    const MemorySource source(problem, scattered_values(8));
    const OracleRows rows = oracle_rows(source, problem, {}, all_rows(problem), PlainProbabilities::rounded_at_scales, 2);
    CHECK(rows.scaled_out.size() == static_cast<std::size_t>(kPlainScales));
    std::vector<std::vector<float>> runs = rows.scaled_out;
    runs.push_back(rows.plain_out);
    std::vector<double> errors;
    for (const std::vector<float>& run : runs) {
      double sum = 0;
      for (std::size_t i = 0; i < rows.out.size(); ++i) { sum += std::pow(static_cast<double>(run[i]) - rows.out[i], 2); }
      errors.push_back(std::sqrt(sum / static_cast<double>(rows.out.size())));
    }
    return *std::max_element(errors.begin(), errors.end()) / *std::min_element(errors.begin(), errors.end());
  };
  CHECK(range_of(2) > 1.2);
  CHECK(range_of(1000) < 1.05);
}

TEST_CASE("keys after a row do not touch it under causal") {
  const std::int64_t cut = 40;
  Problem problem = make_problem(90, 2, 1, 7);
  problem.causal = true;
  Pattern pattern = make_pattern({{64, 1}, {90, 3}}, OffsetRule::group_plus_segment);
  pattern.head_split = HeadSplit::all;
  const auto before = scattered_values(1);
  const MemorySource source(problem, before);
  const MemorySource changed(problem, [&](Tensor tensor, std::int64_t batch, std::int64_t token, std::int64_t head, std::int64_t dim) {
    const float value = before(tensor, batch, token, head, dim);
    return tensor != Tensor::q && token > cut ? 100.0F - value : value;
  });

  const OracleRows rows = oracle_of_all(source, problem, pattern);
  const OracleRows rows_changed = oracle_of_all(changed, problem, pattern);

  const auto row_elements = static_cast<std::ptrdiff_t>(problem.heads * problem.head_dim);
  CHECK(std::equal(rows.out.begin(), rows.out.begin() + (cut + 1) * row_elements, rows_changed.out.begin()));
  CHECK(std::equal(rows.plain_out.begin(), rows.plain_out.begin() + (cut + 1) * row_elements, rows_changed.plain_out.begin()));
  CHECK(std::equal(rows.lse.begin(), rows.lse.begin() + (cut + 1) * problem.heads, rows_changed.lse.begin()));
  CHECK_FALSE(rows.out == rows_changed.out);
}

TEST_CASE("sampled rows in any order equal the same rows of all, bit for bit, on any number of threads") {
  Problem problem = make_problem(150, 4, 2, 5);
  problem.batch = 2;
  problem.dtype = DType::fp16;
  problem.causal = true;
  Pattern pattern = make_pattern({{32, 1}, {150, 4}}, OffsetRule::head);
  pattern.head_split = HeadSplit::all;
  pattern.mixing = GENERATE(Mixing::lse, Mixing::mean);
  const MemorySource source(problem, scattered_values(77));
  const std::vector<RowId> sample{{1, 149}, {0, 3}, {0, 64}, {1, 0}, {0, 4}, {0, 3}, {0, 149}};

  const OracleRows all = oracle_of_all(source, problem, pattern, 3);
  const OracleRows some = oracle_rows(source, problem, pattern, sample, PlainProbabilities::kept, 1);

  for (std::size_t i = 0; i < sample.size(); ++i) {
    const std::int64_t row = sample[i].batch * problem.seq_len + sample[i].row;
    for (std::int64_t head = 0; head < problem.heads; ++head) {
      const auto in_some = static_cast<std::int64_t>(i) * problem.heads + head;
      const std::int64_t in_all = row * problem.heads + head;
      CHECK(some.lse[static_cast<std::size_t>(in_some)] == all.lse[static_cast<std::size_t>(in_all)]);
      CHECK(some.max_score[static_cast<std::size_t>(in_some)] == all.max_score[static_cast<std::size_t>(in_all)]);
      for (std::int64_t dim = 0; dim < problem.head_dim; ++dim) {
        const auto a = static_cast<std::size_t>(in_some * problem.head_dim + dim);
        const auto b = static_cast<std::size_t>(in_all * problem.head_dim + dim);
        CHECK(some.out[a] == all.out[b]);
        CHECK(some.plain_out[a] == all.plain_out[b]);
      }
    }
  }
}

TEST_CASE("only the segments of the rows are read") {
  const Problem problem = make_problem(1000, 1, 1, 2);
  const MemorySource source(problem, scattered_values(2));

  const OracleRows rows =
      oracle_rows(source, problem, make_pattern({{100, 1}}), std::vector<RowId>{{0, 250}, {0, 920}}, PlainProbabilities::kept, 1);

  CHECK(source.tokens_read(Tensor::q) == 2);
  CHECK(source.tokens_read(Tensor::v) == 200);
  CHECK(source.tokens_read(Tensor::k) <= 400);
  CHECK(rows.value_count == 400);
}

TEST_CASE("a segment longer than the window of keys is streamed") {
  // 8 KV heads x head_dim 256 in fp32 are 8 KiB a token: 4096 tokens fill 32 MiB. One head at a time keeps the cost of listing low.
  Problem problem = make_problem(9000, 8, 8, 256);
  problem.causal = true;
  const MemorySource source(problem, [](Tensor tensor, std::int64_t, std::int64_t token, std::int64_t head, std::int64_t dim) {
    if (tensor == Tensor::v) { return static_cast<float>(token + dim); }
    return tensor == Tensor::q && dim == 0 ? static_cast<float>(head) : (dim == 0 ? static_cast<float>(token % 3) * 0.125F : 0.0F);
  });
  const std::vector<RowId> rows{{0, 8999}, {0, 100}, {0, 5000}};

  const OracleRows found = oracle_rows(source, problem, make_pattern({{9000, 7}}, OffsetRule::segment), rows, PlainProbabilities::kept, 2);

  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::int64_t head = 0; head < problem.heads; ++head) {
      double denominator = 0;
      double numerator = 0;
      for (std::int64_t key = 0; key <= rows[i].row && rows[i].row % 7 == 0; key += 7) {
        const double weight = std::exp(static_cast<double>(head * (key % 3)) * 0.125 / 16.0);
        denominator += weight;
        numerator += weight * static_cast<double>(key + 3);
      }
      const auto at = i * 8 + static_cast<std::size_t>(head);
      const double expected = denominator == 0 ? 0.0 : numerator / denominator;
      INFO("row " << rows[i].row << ", head " << head);
      CHECK(std::abs(found.out[at * 256 + 3] - expected) <= 1e-9);
      if (denominator == 0) {
        CHECK(found.lse[at] == kMinusInfinity);
      } else {
        CHECK(std::abs(found.lse[at] - std::log(denominator)) <= 1e-12);
      }
    }
  }
}

TEST_CASE("a head or row that nothing covers has output 0 and LSE minus infinity") {
  const Problem problem = make_problem(20, 2, 2, 3);
  const MemorySource source(problem, scattered_values(4));

  const OracleRows rows =
      oracle_of_all(source, problem, make_pattern({{4, 9}}, OffsetRule::segment));  // offset 4 of segment 4 is past its end

  for (std::int64_t row = 0; row < 20; ++row) {
    const bool covered = row / 4 < 4 && row % 4 == row / 4;
    CHECK(std::isinf(rows.lse[static_cast<std::size_t>(row * 2)]) == !covered);
    CHECK((rows.out[static_cast<std::size_t>(row * 6)] == 0.0) == !covered);
    CHECK((rows.plain_out[static_cast<std::size_t>(row * 6)] == 0.0F) == !covered);
  }
}

TEST_CASE("large scores do not overflow the softmax") {
  Problem problem = make_problem(5, 1, 1, 1);
  problem.scale = 5000.0;
  const MemorySource source(problem, [](Tensor tensor, std::int64_t, std::int64_t token, std::int64_t, std::int64_t) {
    return tensor == Tensor::q ? 1.0F : static_cast<float>(token);
  });

  const OracleRows rows = oracle_of_all(source, problem, {});

  CHECK(rows.out == std::vector<double>(5, 4.0));
  CHECK(rows.lse == std::vector<double>(5, 20000.0));
  CHECK(rows.max_score == std::vector<double>(5, 20000.0));
}

TEST_CASE("a source that fails ends the oracle with its message") {
  const Problem problem = make_problem(50, 1, 1, 1);
  const MemorySource source(problem, [](Tensor tensor, std::int64_t, std::int64_t, std::int64_t, std::int64_t) -> float {
    if (tensor == Tensor::v) { throw RuntimeFailure("the disk is gone"); }
    return 0.0F;
  });

  CHECK_THROWS_AS(oracle_of_all(source, problem, {}), RuntimeFailure);
}

TEST_CASE("the oracle refuses rows outside, foreign extents and no threads") {
  const Problem problem = make_problem(10, 2, 1, 1);
  const MemorySource source(problem, token_number_values());
  Problem other = problem;
  other.kv_heads = 2;

  CHECK_THROWS_AS(oracle_rows(source, problem, {}, std::vector<RowId>{{0, 10}}, PlainProbabilities::kept, 1), InvalidArgument);
  CHECK_THROWS_AS(oracle_rows(source, problem, {}, std::vector<RowId>{{1, 0}}, PlainProbabilities::kept, 1), InvalidArgument);
  CHECK_THROWS_AS(oracle_rows(source, other, {}, std::vector<RowId>{{0, 0}}, PlainProbabilities::kept, 1), InvalidArgument);
  CHECK_THROWS_AS(oracle_rows(source, problem, {}, std::vector<RowId>{{0, 0}}, PlainProbabilities::kept, 0), InvalidArgument);
  CHECK(oracle_rows(source, problem, {}, std::vector<RowId>{}, PlainProbabilities::kept, 1).out.empty());
}

}  // namespace
