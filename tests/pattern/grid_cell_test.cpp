// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/grid_cell.hpp>

#include <annulus/core/error.hpp>
#include <annulus/pattern/branch_rows.hpp>
#include <annulus_test.hpp>

#include <cstdint>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

using namespace annulus;
using annulus::test::contains_text;

namespace {

Problem problem_of(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads) {
  Problem problem;
  problem.batch = batch;
  problem.seq_len = 60;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  return problem;
}

/// For every (branch, query head of the larger problem): the KV head that it sees and what its offset is in three segments.
using Selections = std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::int64_t>>;

void add_selections(Selections& selections, const Problem& problem, const Pattern& pattern, std::int64_t first_head,
                    std::int64_t first_kv_head) {
  for (std::int64_t branch = 0; branch < std::ssize(pattern.branches); ++branch) {
    for (const HeadClass& heads : head_classes(problem, pattern, branch)) {
      std::vector<std::int64_t> offsets;
      for (std::int64_t segment = 0; segment < 3; ++segment) { offsets.push_back(segment_offset(pattern, branch, segment, heads)); }
      for (const HeadSet& set : heads.head_sets) {
        for (std::int64_t j = 0; j < set.kv.count; ++j) {
          for (std::int64_t i = 0; i < set.q_per_kv; ++i) {
            std::vector<std::int64_t> selection{first_kv_head + set.kv[j]};
            selection.insert(selection.end(), offsets.begin(), offsets.end());
            const std::int64_t head = first_head + set.q_first + j * set.kv.stride * problem.group_size() + i;
            CHECK(selections.emplace(std::pair(branch, head), selection).second);
          }
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("the cells of a grid hold every batch entry and query head once, with the KV heads that they see and no other") {
  for (const auto& [batch, heads, kv_heads] : {std::tuple{1, 1, 1}, {3, 6, 6}, {2, 6, 3}, {5, 12, 3}, {2, 8, 2}, {1, 7, 1}, {4, 12, 4}}) {
    const Problem whole = problem_of(batch, heads, kv_heads);
    for (std::int64_t by_batch = 1; by_batch <= batch; ++by_batch) {
      for (std::int64_t by_heads = 1; by_heads <= heads; ++by_heads) {
        const Grid grid{by_batch, by_heads, 1};
        INFO("batch " << batch << ", heads " << heads << "/" << kv_heads << ", " << to_string(grid));
        std::set<std::pair<std::int64_t, std::int64_t>> held;
        for (std::int64_t ring = 0; ring < grid.rings(); ++ring) {
          const GridCell cell = cell_of(whole, grid, ring);
          CHECK_NOTHROW(validate(cell.problem));
          for (std::int64_t entry = 0; entry < cell.problem.batch; ++entry) {
            for (std::int64_t head = 0; head < cell.problem.heads; ++head) {
              const std::int64_t number = cell.first_head + head;
              CHECK(held.emplace(cell.first_batch + entry, number).second);
              CHECK(cell.first_kv_head + head / cell.problem.group_size() == number / whole.group_size());
            }
          }
        }
        CHECK(static_cast<std::int64_t>(held.size()) == whole.batch * whole.heads);
      }
    }
  }
}

TEST_CASE("a head selects the same rows in its cell as in the whole problem, under every rule") {
  for (const auto& [heads, kv_heads] : {std::pair{6, 6}, {6, 3}, {12, 4}, {7, 1}, {8, 2}}) {
    const Problem whole = problem_of(1, heads, kv_heads);
    for (const auto& [offset, offset_name] : EnumNames<OffsetRule>::values) {
      for (const auto& [split, split_name] : EnumNames<HeadSplit>::values) {
        Pattern pattern;
        pattern.branches = {{10, 1}, {20, 3}, {20, 4}, {60, 16}};
        pattern.offset = offset;
        pattern.head_split = split;
        Selections expected;
        add_selections(expected, whole, pattern, 0, 0);
        for (std::int64_t by_heads = 1; by_heads <= heads; ++by_heads) {
          INFO(heads << "/" << kv_heads << " heads in " << by_heads << " parts, offset " << offset_name << ", head-split " << split_name);
          Selections found;
          for (std::int64_t ring = 0; ring < by_heads; ++ring) {
            const GridCell cell = cell_of(whole, {1, by_heads, 1}, ring);
            add_selections(found, cell.problem, pattern, cell.first_head, cell.first_kv_head);
          }
          CHECK(found == expected);
        }
      }
    }
  }
}

TEST_CASE("a cell takes the lengths of its own batch entries along") {
  Problem whole = problem_of(3, 4, 4);
  whole.kv_lengths = {10, 60, 7};
  CHECK(cell_of(whole, {2, 2, 1}, 0).problem.kv_lengths == std::vector<std::int64_t>{10, 60});
  CHECK(cell_of(whole, {2, 2, 1}, 3).problem.kv_lengths == std::vector<std::int64_t>{7});
}

TEST_CASE("what a grid leaves out is found from the ranks, and one that does not fit is refused") {
  const Problem whole = problem_of(2, 6, 2);
  CHECK(resolve_grid({}, whole, 8) == Grid{1, 1, 8});
  CHECK(resolve_grid({2, 2, 0}, whole, 8) == Grid{2, 2, 2});
  CHECK(resolve_grid({1, 6, 1}, whole, 6) == Grid{1, 6, 1});
  CHECK_THROWS_WITH(resolve_grid({1, 3, 0}, whole, 8), contains_text("8 ranks are not divisible into 3 rings"));
  CHECK_THROWS_WITH(resolve_grid({1, 2, 3}, whole, 8), contains_text("has 6 places, and there are 8 ranks"));
  CHECK_THROWS_WITH(resolve_grid({1, 7, 0}, whole, 7), contains_text("the problem has 6 heads"));
  CHECK_THROWS_WITH(resolve_grid({3, 1, 0}, whole, 3), contains_text("the batch has 2 entries"));
}

TEST_CASE("a grid is read as it is printed, and nonsense is refused") {
  for (const Grid& grid : {Grid(), Grid{2, 3, 4}, Grid{1, 8, 0}, Grid{1, 1, 0, true}}) { CHECK(grid_from(to_string(grid)) == grid); }
  CHECK(grid_from("seq=4,heads=2") == Grid{1, 2, 4});
  for (const char* text : {"", "heads", "heads=", "heads=0", "heads=-1", "heads=2,", ",heads=2", "heads=2,heads=2", "rows=2", "heads=2x",
                           "heads=99999999999999999999", "seq=0"}) {
    INFO(text);
    CHECK_THROWS_AS(grid_from(text), InvalidArgument);
  }
}

TEST_CASE("heads that are no cell of a larger problem are refused") {
  Problem problem = problem_of(1, 3, 1);
  problem.window = {2, 8, 2};  // heads 2, 3 and 4 see two KV heads
  CHECK_THROWS_AS(validate(problem), InvalidArgument);
  problem.window = {6, 8, 2};
  CHECK_THROWS_AS(validate(problem), InvalidArgument);
  problem.window = {1, 8, 2};
  CHECK_NOTHROW(validate(problem));
}
