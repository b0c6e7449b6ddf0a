// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/core/list.hpp>
#include <annulus/kernels/dropout.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

inline constexpr std::int64_t kMaxSeqLen = std::int64_t{1} << 48;
inline constexpr std::int64_t kMaxHeadDim = 256;
inline constexpr std::int64_t kMaxBranches = 64;  ///< kernels::kMaxPartials holds one partial for each, and one for extra keys
inline constexpr std::int64_t kMaxExtraKeys = std::int64_t{1} << 24;

/// Which heads of a larger problem those of a problem are: query heads from `first` on, with their KV heads.
struct HeadWindow {
  std::int64_t first = 0;
  std::int64_t heads = 0;  ///< of the larger problem; 0: there is none
  std::int64_t kv_heads = 0;
  bool operator==(const HeadWindow&) const = default;
};

/// One attention: q [batch, seq_len, heads, head_dim], k and v [batch, seq_len, kv_heads, head_dim].
struct Problem {
  std::int64_t batch = 1;
  std::int64_t seq_len = 8192;
  std::int64_t heads = 8;
  std::int64_t kv_heads = 8;
  std::int64_t head_dim = 64;
  DType dtype = DType::fp32;
  bool causal = false;
  double scale = 0.125;  ///< factor of <q, k> before the softmax
  /// [batch], or empty: keys of a batch entry at and past its number are seen by no query. Queries there are computed like any other, and
  /// segments are cut by seq_len. A row of which that hides every key has O = 0 and LSE = -inf.
  List<std::int64_t> kv_lengths = {};
  /// Keys besides those of the sequence, which every query sees: behind a causal mask, past kv_lengths, and where no branch covers it. They
  /// are numbered from seq_len on. In `lse` mixing they count once; of `mean` and `sum`, which are of attentions, each sees them.
  std::int64_t extra_keys = 0;
  /// Where a pattern tells heads apart by their number, it is the number in the larger problem. KV heads are whole groups of query heads,
  /// or one that has more query heads than these.
  HeadWindow window = {};
  /// Of probabilities; of the rows' positions where the pattern orders the sequence. Extra keys are dropped too, keys of zeros have nothing
  /// to drop.
  kernels::Dropout dropout = {};

  std::int64_t group_size() const { return heads / kv_heads; }  ///< query heads of one KV head
  /// Heads of the larger problem, or of this one.
  std::int64_t all_heads() const { return window.heads == 0 ? heads : window.heads; }
  std::int64_t all_kv_heads() const { return window.heads == 0 ? kv_heads : window.kv_heads; }
  /// Number in it of the first KV head here.
  std::int64_t first_kv_head() const { return window.first / (all_heads() / all_kv_heads()); }
  /// Whether a key is one of the extra ones, by its number.
  bool is_extra(std::int64_t key) const { return key >= seq_len; }
  /// Tokens of a batch entry from the first on whose keys are seen.
  std::int64_t kv_length(std::int64_t entry) const { return kv_lengths.empty() ? seq_len : kv_lengths[entry]; }
  bool operator==(const Problem&) const = default;
};

/// One branch of a pattern: segments of segment_length tokens, every dilation_rate-th row of each.
struct Branch {
  std::int64_t segment_length = 0;
  std::int64_t dilation_rate = 1;
  bool operator==(const Branch&) const = default;
};

/// Which keys a query attends, before the causal mask. See the README's section on the operator.
struct Pattern {
  List<Branch> branches;
  OffsetRule offset = OffsetRule::group;
  HeadSplit head_split = HeadSplit::first;
  Mixing mixing = Mixing::lse;
  Ragged ragged = Ragged::short_stride;
  bool scale_by_branches = false;  ///< divide O (not LSE) by the number of branches
  /// Of the sequence. Everything that knows segments and shards works on positions in this order; rows are moved where they enter and
  /// leave.
  SequenceOrder order = SequenceOrder::linear;
  bool operator==(const Pattern&) const = default;
};

/// The pattern of plain attention: one branch that spans the sequence.
Pattern dense_pattern(std::int64_t seq_len);

/// @throws InvalidArgument naming the field, what was found and what is allowed
void validate(const Problem& problem);
void validate(const Pattern& pattern);

/// That the pattern can be that of the problem; each of them valid by itself.
/// @throws InvalidArgument if Ragged::reject is asked for and a rate does not divide its segment, or a segment the sequence; or if a causal
/// mask meets an order of the sequence in which earlier tokens do not come first; or if kv_lengths meets such an order, or
/// Ragged::zero_keys
void validate(const Problem& problem, const Pattern& pattern);

}  // namespace annulus
