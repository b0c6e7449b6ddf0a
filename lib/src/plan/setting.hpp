// SPDX-License-Identifier: Apache-2.0
// What every part of planning reads: the arguments of make_plan, and what follows from them alone.
#pragma once

#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <vector>

namespace annulus::planning {

struct Setting {
  const Problem& problem;
  const Pattern& pattern;
  const Partition& partition;
  const Routing& routing;
  std::int64_t rank = 0;
  Shard shard;
  List<List<HeadClass>> classes;  ///< by branch

  const Branch& branch(std::int64_t number) const { return pattern.branches[number]; }
  const HeadClass& heads(std::int64_t branch, std::int64_t head_class) const { return classes[branch][head_class]; }
  Rows<Global> rows_of(std::int64_t branch, std::int64_t head_class, std::int64_t segment) const {
    return segment_rows(problem.seq_len, pattern, branch, segment, heads(branch, head_class));
  }
  /// Calls visit(branch, head class) for all of them, in order.
  template <class Visit>
  void for_each_class(Visit&& visit) const {
    for (std::int64_t branch = 0; branch < std::ssize(classes); ++branch) {
      for (std::int64_t index = 0; index < std::ssize(classes[branch]); ++index) { visit(branch, index); }
    }
  }
};

/// @throws InvalidArgument if problem, pattern, partition and routing do not agree
Setting make_setting(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing, std::int64_t rank);

/// Full-length segments [begin, end) of a branch that lie inside one piece of a shard.
Progression whole_segments(const Setting& setting, std::int64_t branch, const ShardPiece& piece);

/// Segments of a branch that the rank's shard touches and that are not whole in it, ascending.
std::vector<std::int64_t> cut_segments(const Setting& setting, std::int64_t branch);

/// Calls visit(branch, head class, segment) for every cut segment of every head class, in order.
template <class Visit>
void for_each_cut_segment(const Setting& setting, Visit&& visit) {
  setting.for_each_class([&](std::int64_t branch, std::int64_t head_class) {
    for (const std::int64_t segment : cut_segments(setting, branch)) { visit(branch, head_class, segment); }
  });
}

}  // namespace annulus::planning
