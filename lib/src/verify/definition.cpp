// SPDX-License-Identifier: Apache-2.0
// Shares nothing with lib/pattern or lib/plan: whether a token is selected is asked of every token, from the definition of the operator.
#include "definition.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>

namespace annulus {

namespace {

/// Whether a place is (offset + t * rate) mod length, for one of the ceil(length / rate) first numbers t: seen from the place, some whole
/// number of lengths further on lies a step that is taken.
bool is_wrapped_to(std::int64_t length, std::int64_t rate, std::int64_t offset, std::int64_t place) {
  if (rate >= length) { return offset % length == place; }  // one step
  const std::int64_t steps = (length - 1) / rate + 1;
  for (std::int64_t unrolled = place; unrolled <= offset + (steps - 1) * rate; unrolled += length) {
    if (unrolled >= offset && (unrolled - offset) % rate == 0) { return true; }
  }
  return false;
}

}  // namespace

bool head_runs_branch(const Problem& problem, const Pattern& pattern, std::int64_t branch, std::int64_t head) {
  if (pattern.head_split == HeadSplit::all) { return true; }
  const std::int64_t branches = std::ssize(pattern.branches);
  const std::int64_t spare = problem.heads % branches;
  std::int64_t first = 0;
  for (std::int64_t g = 0; g < branches; ++g) {
    const bool takes_spare = pattern.head_split == HeadSplit::first ? g < spare : g >= branches - spare;
    const std::int64_t count = problem.heads / branches + (takes_spare ? 1 : 0);
    if (head >= first && head < first + count) { return g == branch; }
    first += count;
  }
  return false;
}

std::int64_t offset_of(const Problem& problem, const Pattern& pattern, std::int64_t branch, std::int64_t segment, std::int64_t head) {
  const std::int64_t rate = pattern.branches[branch].dilation_rate;
  switch (pattern.offset) {
    case OffsetRule::group:
      return branch % rate;
    case OffsetRule::group_plus_segment:
      return (branch + segment) % rate;
    case OffsetRule::segment:
      return segment % rate;
    case OffsetRule::head:
      return (head * problem.kv_heads / problem.heads) % rate;
    case OffsetRule::head_block: {
      // The heads, padded to a multiple of the rate, are cut into as many blocks of neighbours.
      const std::int64_t padded = problem.kv_heads + (rate - problem.kv_heads % rate) % rate;
      return (head * problem.kv_heads / problem.heads) * rate / padded;
    }
  }
  ANNULUS_ASSERT(false, "offset rule {} is unknown to the oracle", static_cast<int>(pattern.offset));
}

bool is_selected(const Problem& problem, const Pattern& pattern, const Branch& branch, std::int64_t segment, std::int64_t offset,
                 std::int64_t token) {
  if (token / branch.segment_length != segment) { return false; }
  const std::int64_t begin = segment * branch.segment_length;
  const std::int64_t place = token - begin;
  const bool in_tail = branch.segment_length > problem.seq_len - begin;
  if (pattern.ragged == Ragged::dense_tail && in_tail) { return true; }
  if (pattern.ragged == Ragged::wrap) {
    return is_wrapped_to(std::min(branch.segment_length, problem.seq_len - begin), branch.dilation_rate, offset, place);
  }
  if (place < offset || (place - offset) % branch.dilation_rate != 0) { return false; }
  switch (pattern.ragged) {
    case Ragged::short_stride:
    case Ragged::dense_tail:
    case Ragged::zero_keys:
    case Ragged::reject:
    case Ragged::wrap:  // it has its own rule, above
      return true;
    case Ragged::truncate:
      break;
  }
  // Whole strides of the tokens that the segment has: what is left over belongs to no offset.
  const std::int64_t length = std::min(begin + branch.segment_length, problem.seq_len) - begin;
  const std::int64_t strides = (length - length % branch.dilation_rate) / branch.dilation_rate;
  return (place - offset) / branch.dilation_rate < strides;
}

std::int64_t zero_slots(const Problem& problem, const Pattern& pattern, const Branch& branch, std::int64_t segment, std::int64_t offset) {
  if (pattern.ragged != Ragged::zero_keys || problem.causal) { return 0; }
  const std::int64_t whole = std::min(branch.segment_length, problem.seq_len);
  const std::int64_t slots = whole / branch.dilation_rate + (whole % branch.dilation_rate == 0 ? 0 : 1);
  const std::int64_t tokens = std::min(whole, problem.seq_len - segment * whole);
  const std::int64_t filled = tokens <= offset ? 0 : (tokens - offset - 1) / branch.dilation_rate + 1;
  return slots - filled;
}

bool is_masked(const Problem& problem, std::int64_t batch, std::int64_t query, std::int64_t key) {
  if (key >= problem.seq_len) { return false; }  // an extra key: every query sees it
  if (problem.causal && key > query) { return true; }
  return !problem.kv_lengths.empty() && key >= problem.kv_lengths[batch];
}

}  // namespace annulus
