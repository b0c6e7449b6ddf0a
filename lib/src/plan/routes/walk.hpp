// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "plan/setting.hpp"

#include <cstdint>
#include <vector>

namespace annulus::planning {

/// The parts of a segment, rows that lie in one piece of the sequence each, in the order of the sequence; and how the ranks that own them
/// walk over them under schedule direct.
class Walk {
 public:
  struct Part {
    std::int64_t rank = 0;
    Rows<Global> rows;
  };
  /// A rank that owns parts, by number: one, or two.
  struct Member {
    std::int64_t rank = 0;
    std::int64_t lower = -1;  ///< -1: it owns one
    std::int64_t upper = 0;
    std::int64_t last_row = -1;  ///< the query that sees most under a causal mask
  };

  /// Of the segment whose rows, for one head class, are `rows`. The same for all ranks.
  Walk(const Setting& setting, std::int64_t branch, std::int64_t segment, const Rows<Global>& rows);

  std::int64_t parts() const { return std::ssize(parts_); }
  const Part& part(std::int64_t number) const { return parts_[static_cast<std::size_t>(number)]; }
  /// By rank, ascending.
  const std::vector<Member>& members() const { return members_; }
  /// Null if the rank owns no part.
  const Member* member(std::int64_t rank) const;

  /// Whether queries of the member see keys of a part of another rank.
  bool needs(const Member& member, std::int64_t number) const {
    return part(number).rank != member.rank && (!causal_ || member.last_row >= part(number).rows[0]);
  }

  /// The step in which queries of the member first meet part `number`, which it needs. Under a causal mask they walk down from the member's
  /// upper part, a step for each piece of queries that a part meets, own keys included; else, and where parts are stripes, of which none
  /// precedes another, once round, a step for each part of others.
  std::int64_t step(const Member& member, std::int64_t number) const {
    const std::int64_t upper = member.upper;
    const std::int64_t lower = member.lower;
    if (causal_ && !stripes_) { return upper - number + (number < lower ? lower - 1 - number : 0); }
    const auto down = [&](std::int64_t to) { return to <= upper ? upper - to : upper - to + parts(); };
    return down(number) - (lower >= 0 && down(lower) < down(number) ? 1 : 0);
  }

 private:
  bool causal_;
  bool stripes_;
  std::vector<Part> parts_;
  std::vector<Member> members_;
};

}  // namespace annulus::planning
