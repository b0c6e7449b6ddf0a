// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/problem.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace annulus {

namespace {

/// Whether the product of positive factors stays below 2^62, so that byte counts and offsets cannot overflow.
bool product_fits(std::initializer_list<std::int64_t> factors) {
  std::int64_t product = 1;
  for (const std::int64_t factor : factors) {
    if (factor > (std::int64_t{1} << 62) / product) { return false; }
    product *= factor;
  }
  return true;
}

void validate_window(const Problem& problem) {
  const HeadWindow& window = problem.window;
  if (window.heads == 0) { return; }
  ANNULUS_EXPECTS(window.kv_heads >= 1 && window.heads % window.kv_heads == 0, "kv-heads {} does not divide heads {}", window.kv_heads,
                  window.heads);
  ANNULUS_EXPECTS(window.first >= 0 && window.first + problem.heads <= window.heads, "heads {} to {} of a problem with {}", window.first,
                  window.first + problem.heads - 1, window.heads);
  const std::int64_t group = window.heads / window.kv_heads;
  const bool whole_groups = window.first % group == 0 && problem.group_size() == group;
  const bool of_one_group = problem.kv_heads == 1 && window.first % group + problem.heads <= group;
  ANNULUS_EXPECTS(whole_groups || of_one_group, "{} heads from {} on, with {} KV heads, are neither whole groups of {} nor of one",
                  problem.heads, window.first, problem.kv_heads, group);
}

}  // namespace

Pattern dense_pattern(std::int64_t seq_len) {
  Pattern pattern;
  pattern.branches = {{seq_len, 1}};
  return pattern;
}

void validate(const Problem& problem) {
  ANNULUS_EXPECTS(problem.batch >= 1, "batch {} is not positive", problem.batch);
  ANNULUS_EXPECTS(problem.seq_len >= 1, "seq-len {} is not positive", problem.seq_len);
  ANNULUS_EXPECTS(problem.seq_len <= kMaxSeqLen, "seq-len {} is beyond 2^48", problem.seq_len);
  ANNULUS_EXPECTS(problem.heads >= 1, "heads {} is not positive", problem.heads);
  ANNULUS_EXPECTS(problem.kv_heads >= 1, "kv-heads {} is not positive", problem.kv_heads);
  ANNULUS_EXPECTS(problem.heads % problem.kv_heads == 0, "kv-heads {} does not divide heads {}", problem.kv_heads, problem.heads);
  ANNULUS_EXPECTS(problem.head_dim >= 1 && problem.head_dim <= kMaxHeadDim, "head-dim {} is outside 1..{}", problem.head_dim, kMaxHeadDim);
  ANNULUS_EXPECTS(std::isfinite(problem.scale), "scale {} is not finite", problem.scale);
  ANNULUS_EXPECTS(product_fits({problem.batch, problem.seq_len, problem.heads, problem.head_dim, 16}),
                  "batch {} x seq-len {} x heads {} x head-dim {} is beyond 2^58 elements", problem.batch, problem.seq_len, problem.heads,
                  problem.head_dim);
  ANNULUS_EXPECTS(problem.extra_keys >= 0 && problem.extra_keys <= kMaxExtraKeys, "extra-keys {} is outside 0..{}", problem.extra_keys,
                  kMaxExtraKeys);
  ANNULUS_EXPECTS(product_fits({problem.batch, std::max<std::int64_t>(1, problem.extra_keys), problem.kv_heads, problem.head_dim, 16}),
                  "batch {} x extra-keys {} x kv-heads {} x head-dim {} is beyond 2^58 elements", problem.batch, problem.extra_keys,
                  problem.kv_heads, problem.head_dim);
  ANNULUS_EXPECTS(problem.dropout.probability >= 0 && problem.dropout.probability < 1, "dropout {} is outside [0, 1)",
                  problem.dropout.probability);
  validate_window(problem);
  if (problem.kv_lengths.empty()) { return; }
  ANNULUS_EXPECTS(std::ssize(problem.kv_lengths) == problem.batch, "kv-lengths has {} numbers, and batch is {}; one for each batch entry",
                  problem.kv_lengths.size(), problem.batch);
  for (const std::int64_t length : problem.kv_lengths) {
    ANNULUS_EXPECTS(length >= 1 && length <= problem.seq_len, "kv-lengths: {} is outside 1..{}, the length of the sequence", length,
                    problem.seq_len);
  }
}

void validate(const Pattern& pattern) {
  ANNULUS_EXPECTS(!pattern.branches.empty(), "the pattern has no branch: segment-lengths is empty");
  ANNULUS_EXPECTS(static_cast<std::int64_t>(pattern.branches.size()) <= kMaxBranches, "{} branches are more than {}",
                  pattern.branches.size(), kMaxBranches);
  for (const Branch& branch : pattern.branches) {
    ANNULUS_EXPECTS(branch.segment_length >= 1, "segment-lengths: {} is not positive", branch.segment_length);
    ANNULUS_EXPECTS(branch.dilation_rate >= 1, "dilation-rates: {} is not positive", branch.dilation_rate);
    ANNULUS_EXPECTS(branch.segment_length <= kMaxSeqLen, "segment-lengths: {} is beyond 2^48", branch.segment_length);
    ANNULUS_EXPECTS(branch.dilation_rate <= kMaxSeqLen, "dilation-rates: {} is beyond 2^48", branch.dilation_rate);
  }
}

void validate(const Problem& problem, const Pattern& pattern) {
  ANNULUS_EXPECTS(!problem.causal || pattern.order == SequenceOrder::linear,
                  "--order {} moves later tokens before earlier ones, so that --causal has no meaning", to_string(pattern.order));
  ANNULUS_EXPECTS(problem.kv_lengths.empty() || pattern.order == SequenceOrder::linear,
                  "--order {} spreads the last tokens over the sequence, so that kv-lengths cannot hide them", to_string(pattern.order));
  switch (pattern.ragged) {
    case Ragged::short_stride:
    case Ragged::wrap:
    case Ragged::truncate:
    case Ragged::dense_tail:
      return;
    case Ragged::zero_keys:
      ANNULUS_EXPECTS(
          problem.kv_lengths.empty(),
          "--ragged zero-keys pads segments with keys that have no place in the sequence, so that no length of keys hides them: "
          "it cannot have kv-lengths");
      return;
    case Ragged::reject:
      break;
  }
  for (const Branch& branch : pattern.branches) {
    ANNULUS_EXPECTS(branch.segment_length % branch.dilation_rate == 0,
                    "--ragged reject: dilation rate {} does not divide the segment length {}", branch.dilation_rate, branch.segment_length);
    ANNULUS_EXPECTS(problem.seq_len % branch.segment_length == 0, "--ragged reject: the segment length {} does not divide seq-len {}",
                    branch.segment_length, problem.seq_len);
  }
}

}  // namespace annulus
