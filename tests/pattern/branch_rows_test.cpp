// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/branch_rows.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include <numeric>
#include <set>
#include <utility>
#include <vector>

using namespace annulus;

namespace {

Problem problem_with(std::int64_t seq_len, std::int64_t heads, std::int64_t kv_heads) {
  Problem problem;
  problem.seq_len = seq_len;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  return problem;
}

std::vector<std::int64_t> sizes(const Problem& problem, const Pattern& pattern) {
  std::vector<std::int64_t> counts;
  for (std::size_t g = 0; g < pattern.branches.size(); ++g) {
    counts.push_back(heads_of_branch(problem, pattern, static_cast<std::int64_t>(g)).count);
  }
  return counts;
}

Pattern three_branches() {
  Pattern pattern;
  pattern.branches = {{4, 1}, {8, 2}, {16, 4}};
  return pattern;
}

}  // namespace

TEST_CASE("eight heads over three branches split (3,3,2) first and (2,3,3) last") {
  Pattern pattern = three_branches();
  const Problem problem = problem_with(16, 8, 8);
  CHECK(sizes(problem, pattern) == std::vector<std::int64_t>{3, 3, 2});
  pattern.head_split = HeadSplit::last;
  CHECK(sizes(problem, pattern) == std::vector<std::int64_t>{2, 3, 3});
  CHECK(heads_of_branch(problem, pattern, 1).first == 2);
  CHECK(heads_of_branch(problem, pattern, 2).first == 5);
  pattern.head_split = HeadSplit::all;
  CHECK(sizes(problem, pattern) == std::vector<std::int64_t>{8, 8, 8});
}

TEST_CASE("fewer heads than branches leave branches empty") {
  Pattern pattern = three_branches();
  CHECK(sizes(problem_with(16, 2, 2), pattern) == std::vector<std::int64_t>{1, 1, 0});
  pattern.head_split = HeadSplit::last;
  CHECK(sizes(problem_with(16, 2, 2), pattern) == std::vector<std::int64_t>{0, 1, 1});
  CHECK(head_classes(problem_with(16, 2, 2), pattern, 0).empty());
}

TEST_CASE("a segment of ten rows at rate three and offset one holds 1, 4 and 7") {
  Pattern pattern;
  pattern.branches = {{10, 3}, {10, 3}};  // branch 1 has offset 1 by the group rule
  const Problem problem = problem_with(10, 2, 2);
  const HeadClass heads = head_classes(problem, pattern, 1).front();
  CHECK(segment_rows(10, pattern, 1, 0, heads) == Rows<Global>(Progression{1, 3, 3}));
}

TEST_CASE("offsets follow their rules") {
  Pattern pattern;
  pattern.branches = {{8, 4}, {8, 4}};
  const Problem problem = problem_with(64, 8, 4);
  const HeadClass any{};
  pattern.offset = OffsetRule::group;
  CHECK(segment_offset(pattern, 1, 5, any) == 1);
  pattern.offset = OffsetRule::group_plus_segment;
  CHECK(segment_offset(pattern, 1, 5, any) == 2);
  pattern.offset = OffsetRule::segment;
  CHECK(segment_offset(pattern, 1, 5, any) == 1);
  CHECK(offset_period(pattern, 0) == 4);
  pattern.offset = OffsetRule::head;
  pattern.head_split = HeadSplit::all;
  const std::vector<HeadClass> classes = head_classes(problem, pattern, 0);
  REQUIRE(classes.size() == 4);
  for (std::int64_t i = 0; i < 4; ++i) {
    CHECK(segment_offset(pattern, 0, 5, classes[static_cast<std::size_t>(i)]) == i);
    CHECK(classes[static_cast<std::size_t>(i)].kv == Progression{i, 4, 1});
  }
}

TEST_CASE("a truncated segment has equally many rows at every offset") {
  Pattern pattern;
  pattern.branches = {{10, 3}};
  pattern.offset = OffsetRule::segment;
  const HeadClass any{};
  const auto counts = [&] {
    std::vector<std::int64_t> found;
    for (std::int64_t segment = 0; segment < 4; ++segment) { found.push_back(segment_rows(35, pattern, 0, segment, any).count()); }
    return found;
  };
  CHECK(counts() == std::vector<std::int64_t>{4, 3, 3, 2});  // the last segment has five tokens
  pattern.ragged = Ragged::truncate;
  CHECK(counts() == std::vector<std::int64_t>{3, 3, 3, 1});
  pattern.branches = {{2, 3}};
  CHECK(segment_rows(35, pattern, 0, 0, any).empty());
}

TEST_CASE("a segment of ten rows that wraps at rate three and offset one holds 1, 4, 7 and then 0") {
  Pattern pattern;
  pattern.branches = {{10, 3}, {10, 3}};
  pattern.ragged = Ragged::wrap;
  const HeadClass heads = head_classes(problem_with(10, 2, 2), pattern, 1).front();
  const Rows<Global> rows = segment_rows(10, pattern, 1, 0, heads);
  REQUIRE(rows.runs() == 2);
  CHECK(rows.run(0) == Progression{0, 1, 1});
  CHECK(rows.run(1) == Progression{1, 3, 3});
  // It has a block of its own, before those of the others.
  CHECK(segment_places(rows, rows.run(0), 8) == Progression{7, 1, 1});
  CHECK(segment_places(rows, {4, 3, 2}, 8) == Progression{9, 1, 2});
  CHECK(segment_rows(10, pattern, 0, 0, heads) == Rows<Global>(Progression{0, 3, 4}));
}

TEST_CASE("wrapped rows are the definition's, ascending, whatever length, rate and offset") {
  Pattern pattern;
  pattern.offset = OffsetRule::segment;
  pattern.ragged = Ragged::wrap;
  std::int64_t turned_over = 0;
  for (std::int64_t length = 1; length <= 23; ++length) {
    for (std::int64_t rate = 1; rate <= 50; ++rate) {
      pattern.branches = {{length, rate}};
      for (std::int64_t offset = 0; offset < rate; ++offset) {
        std::set<std::int64_t> expected;
        for (std::int64_t t = 0; t * rate < length; ++t) { expected.insert(offset * length + (offset + t * rate) % length); }
        INFO("length " << length << ", rate " << rate << ", offset " << offset);
        REQUIRE(std::ssize(expected) == (length + rate - 1) / rate);  // no row twice

        const Rows<Global> rows = segment_rows(rate * length, pattern, 0, offset, {});

        std::vector<std::int64_t> found;
        for (std::int64_t i = 0; i < rows.count(); ++i) { found.push_back(rows[i]); }
        REQUIRE(found == std::vector<std::int64_t>(expected.begin(), expected.end()));
        REQUIRE(rows.last() == found.back());
        REQUIRE(rows.runs() <= 2);
        if (rows.runs() == 2) {
          ++turned_over;
          REQUIRE(rows.run(0).count == 1);
          REQUIRE(rows.run(1) == Progression{offset * length + offset, rate, rows.count() - 1});
        }
      }
    }
  }
  CHECK(turned_over > 1000);
}

TEST_CASE("what a segment lacks of a whole one are keys of zeros, which a causal mask hides") {
  Problem problem = problem_with(35, 1, 1);
  Pattern pattern;
  pattern.branches = {{10, 3}};
  pattern.offset = OffsetRule::segment;
  const auto counts = [&] {
    std::vector<std::int64_t> found;
    for (std::int64_t segment = 0; segment < segment_count(problem.seq_len, pattern.branches[0]); ++segment) {
      found.push_back(zero_keys(problem, pattern, 0, segment_rows(problem.seq_len, pattern, 0, segment, {})));
    }
    return found;
  };
  CHECK(counts() == std::vector<std::int64_t>{0, 0, 0, 0});
  pattern.ragged = Ragged::zero_keys;
  CHECK(counts() == std::vector<std::int64_t>{0, 1, 1, 2});
  problem.seq_len = 8;  // the segment is cut to the sequence: slots 0, 3, 6
  CHECK(counts() == std::vector<std::int64_t>{0});
  problem.seq_len = 11;
  CHECK(counts() == std::vector<std::int64_t>{0, 0});  // the second has no row that could see any
  problem.seq_len = 12;
  CHECK(counts() == std::vector<std::int64_t>{0, 3});
  problem.causal = true;
  CHECK(counts() == std::vector<std::int64_t>{0, 0});
}

TEST_CASE("a dense tail is every row past the last whole segment, whatever the offset") {
  Pattern pattern;
  pattern.branches = {{10, 3}};
  pattern.offset = OffsetRule::segment;
  pattern.ragged = Ragged::dense_tail;
  const HeadClass any{};
  CHECK(segment_rows(35, pattern, 0, 2, any) == Rows<Global>(Progression{22, 3, 3}));
  CHECK(segment_rows(35, pattern, 0, 3, any) == Rows<Global>(Progression{30, 1, 5}));
  CHECK(segment_rows(30, pattern, 0, 2, any) == Rows<Global>(Progression{22, 3, 3}));
  CHECK(segment_rows(7, pattern, 0, 0, any) == Rows<Global>(Progression{0, 1, 7}));
  CHECK(row_distance(35, pattern, 0, 2) == 3);
  CHECK(row_distance(35, pattern, 0, 3) == 1);
}

TEST_CASE("blocks of heads share an offset, also where the rate does not divide the heads") {
  Pattern pattern;
  pattern.branches = {{64, 3}};
  pattern.offset = OffsetRule::head_block;
  const auto offsets = [&](std::int64_t rate, std::int64_t heads, std::int64_t kv_heads) {
    pattern.branches[0].dilation_rate = rate;
    std::vector<std::pair<std::int64_t, std::int64_t>> found;  // offset, KV heads
    for (const HeadClass& heads_of : head_classes(problem_with(64, heads, kv_heads), pattern, 0)) {
      CHECK(heads_of.kv.stride == 1);
      found.emplace_back(segment_offset(pattern, 0, 5, heads_of), heads_of.kv.count);
    }
    return found;
  };
  using Offsets = std::vector<std::pair<std::int64_t, std::int64_t>>;
  CHECK(offsets(3, 16, 16) == Offsets{{0, 6}, {1, 6}, {2, 4}});
  CHECK(offsets(16, 16, 16).size() == 16);
  CHECK(offsets(4, 16, 2) == Offsets{{0, 1}, {1, 1}});
  CHECK(offsets(1, 6, 3) == Offsets{{0, 3}});
  CHECK(offsets(5, 6, 6) == Offsets{{0, 2}, {1, 2}, {2, 2}});  // the offsets 3 and 4 have no head
}

TEST_CASE("a rate beyond the segment leaves segments without rows") {
  Pattern pattern;
  pattern.branches = {{3, 7}};
  pattern.offset = OffsetRule::segment;
  const HeadClass any{};
  CHECK(segment_rows(40, pattern, 0, 2, any) == Rows<Global>(Progression{8, 1, 1}));
  CHECK(segment_rows(40, pattern, 0, 3, any).empty());
}

TEST_CASE("head sets name every query head of a branch once, whatever the branch cuts") {
  for (const OffsetRule rule : {OffsetRule::group, OffsetRule::head, OffsetRule::head_block}) {
    for (const std::int64_t heads : {1, 2, 6, 12, 13}) {
      for (std::int64_t kv_heads = 1; kv_heads <= heads; ++kv_heads) {
        if (heads % kv_heads != 0) { continue; }
        for (const HeadSplit split : {HeadSplit::first, HeadSplit::last, HeadSplit::all}) {
          Pattern pattern;
          pattern.branches = {{4, 1}, {8, 2}, {16, 3}, {16, 5}};
          pattern.offset = rule;
          pattern.head_split = split;
          const Problem problem = problem_with(16, heads, kv_heads);
          std::multiset<std::int64_t> named;
          std::multiset<std::int64_t> expected;
          for (std::int64_t branch = 0; branch < 4; ++branch) {
            const HeadRange range = heads_of_branch(problem, pattern, branch);
            for (std::int64_t h = range.first; h < range.end(); ++h) { expected.insert(branch * 100 + h); }
            for (const HeadClass& heads_class : head_classes(problem, pattern, branch)) {
              std::int64_t kv_count = 0;
              for (const HeadSet& set : heads_class.head_sets) {
                kv_count += set.kv.count;
                for (std::int64_t j = 0; j < set.kv.count; ++j) {
                  for (std::int64_t i = 0; i < set.q_per_kv; ++i) {
                    const std::int64_t head = set.q_first + j * set.kv.stride * problem.group_size() + i;
                    CHECK(head / problem.group_size() == set.kv[j]);
                    CHECK(heads_class.kv.contains(set.kv[j]));
                    named.insert(branch * 100 + head);
                  }
                }
              }
              CHECK(kv_count == heads_class.kv.count);
            }
          }
          INFO("heads " << heads << " kv " << kv_heads << " split " << to_string(split));
          CHECK(named == expected);
        }
      }
    }
  }
}

TEST_CASE("partials are kept per branch only where a head has several branches that do not share one softmax") {
  Pattern pattern = three_branches();
  CHECK(partial_count(pattern) == 1);
  pattern.mixing = Mixing::sum;
  CHECK(partial_count(pattern) == 1);
  pattern.head_split = HeadSplit::all;
  CHECK(partial_count(pattern) == 3);
  pattern.mixing = Mixing::lse;
  CHECK(partial_count(pattern) == 1);
}

TEST_CASE("validate refuses what cannot be computed and names it") {
  Problem problem = problem_with(16, 8, 3);
  CHECK_THROWS_AS(validate(problem), InvalidArgument);
  problem.kv_heads = 4;
  CHECK_NOTHROW(validate(problem));
  problem.head_dim = 257;
  CHECK_THROWS_WITH(validate(problem), "head-dim 257 is outside 1..256");
  problem.head_dim = 64;
  problem.seq_len = std::int64_t{1} << 60;
  CHECK_THROWS_AS(validate(problem), InvalidArgument);
  Pattern pattern;
  CHECK_THROWS_AS(validate(pattern), InvalidArgument);
  pattern.branches = {{0, 1}};
  CHECK_THROWS_AS(validate(pattern), InvalidArgument);
  pattern.branches = {{1, 0}};
  CHECK_THROWS_AS(validate(pattern), InvalidArgument);
}
