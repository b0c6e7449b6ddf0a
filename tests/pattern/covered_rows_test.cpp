// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/covered_rows.hpp>

#include <annulus_test.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

using namespace annulus;

namespace {

/// The definition, by brute force: whether some branch that head `head` runs selects `row`.
bool is_covered(const Problem& problem, const Pattern& pattern, std::int64_t head, std::int64_t row) {
  for (std::int64_t g = 0; g < std::ssize(pattern.branches); ++g) {
    const HeadRange heads = heads_of_branch(problem, pattern, g);
    if (head < heads.first || head >= heads.end()) { continue; }
    const Branch& branch = pattern.branches[static_cast<std::size_t>(g)];
    const std::int64_t segment = row / branch.segment_length;
    std::int64_t offset = 0;
    switch (pattern.offset) {
      case OffsetRule::group:
        offset = g;
        break;
      case OffsetRule::group_plus_segment:
        offset = g + segment;
        break;
      case OffsetRule::segment:
        offset = segment;
        break;
      case OffsetRule::head:
        offset = head * problem.kv_heads / problem.heads;
        break;
      case OffsetRule::head_block: {
        // Block after block of neighbours, until all heads have one.
        std::int64_t left = head * problem.kv_heads / problem.heads;
        const std::int64_t block = (problem.kv_heads + branch.dilation_rate - 1) / branch.dilation_rate;
        for (; left >= block; left -= block) { ++offset; }
        break;
      }
    }
    const std::int64_t distance = row % branch.segment_length - offset % branch.dilation_rate;
    const std::int64_t length = std::min(branch.segment_length, problem.seq_len - segment * branch.segment_length);
    const bool left_over = pattern.ragged == Ragged::truncate && distance / branch.dilation_rate >= length / branch.dilation_rate;
    const bool in_tail = pattern.ragged == Ragged::dense_tail && length < branch.segment_length;
    if (in_tail) { return true; }
    if (pattern.ragged == Ragged::wrap) {
      for (std::int64_t t = 0; t * branch.dilation_rate < length; ++t) {
        if ((offset % branch.dilation_rate + t * branch.dilation_rate) % length == row % branch.segment_length) { return true; }
      }
      continue;
    }
    if (distance >= 0 && distance % branch.dilation_rate == 0 && !left_over) { return true; }
  }
  return false;
}

}  // namespace

TEST_CASE("covered rows are those that the definition selects, for every offset, head split and grouping") {
  std::int64_t uncovered = 0;
  for (const OffsetRule offset :
       {OffsetRule::group, OffsetRule::group_plus_segment, OffsetRule::segment, OffsetRule::head, OffsetRule::head_block}) {
    for (const HeadSplit split : {HeadSplit::first, HeadSplit::last, HeadSplit::all}) {
      for (const std::int64_t kv_heads : {1, 2, 6}) {
        Problem problem;
        problem.seq_len = 53;
        problem.heads = 6;
        problem.kv_heads = kv_heads;
        Pattern pattern;
        pattern.branches = {{8, 2}, {20, 5}, {53, 7}};
        pattern.offset = offset;
        pattern.head_split = split;
        pattern.ragged = kv_heads == 2 ? Ragged::truncate : kv_heads == 6 ? Ragged::dense_tail : Ragged::short_stride;
        if (split == HeadSplit::last) { pattern.ragged = Ragged::wrap; }
        const CoveredRows covered(problem, pattern);
        for (std::int64_t head = 0; head < problem.heads; ++head) {
          for (std::int64_t row = 0; row < problem.seq_len; ++row) {
            const bool expected = is_covered(problem, pattern, head, row);
            uncovered += expected ? 0 : 1;
            INFO(to_string(offset) << " " << to_string(split) << " kv " << kv_heads << " head " << head << " row " << row);
            REQUIRE(covered.sees_key(0, head, row) == expected);
          }
        }
      }
    }
  }
  CHECK(uncovered > 1000);
}

TEST_CASE("a dense pattern covers every row") {
  Problem problem;
  problem.seq_len = 5;
  const CoveredRows covered(problem, dense_pattern(5));
  for (std::int64_t row = 0; row < 5; ++row) { CHECK(covered.sees_key(0, 7, row)); }
}

TEST_CASE("a row of which a batch entry hides all keys sees none") {
  Problem problem;
  problem.batch = 2;
  problem.seq_len = 12;
  problem.kv_lengths = {12, 6};
  Pattern pattern;
  pattern.branches = {{5, 2}, {5, 2}};  // head 0, in branch 0: 0, 2, 4 | 6, 8 | 10
  pattern.offset = OffsetRule::group_plus_segment;
  const CoveredRows covered(problem, pattern);
  std::vector<std::int64_t> seeing;
  for (std::int64_t row = 0; row < 12; ++row) {
    if (covered.sees_key(1, 0, row)) { seeing.push_back(row); }
    CHECK(covered.sees_key(0, 0, row) == (row < 5 ? row % 2 == 0 : row < 10 ? row % 2 == 0 : row == 10));
  }
  // Segment 1 holds 6 and 8, which are hidden.
  CHECK(seeing == std::vector<std::int64_t>{0, 2, 4});
}
