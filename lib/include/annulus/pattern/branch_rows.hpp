// SPDX-License-Identifier: Apache-2.0
// The row sets I(branch, segment, head) of the operator, and the heads that share one.
#pragma once

#include <annulus/core/problem.hpp>
#include <annulus/pattern/progression.hpp>
#include <annulus/pattern/rows.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// Query heads [first, first+count) that run a branch.
struct HeadRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
  std::int64_t end() const { return first + count; }
};

/// KV heads with, for each, the same number of neighbouring query heads: query head (j, i) = q_first + j * kv.stride * group_size + i.
struct HeadSet {
  Progression kv;
  std::int64_t q_first = 0;
  std::int64_t q_per_kv = 0;
  bool operator==(const HeadSet&) const = default;
};

/// The heads of one branch whose rows agree in every segment: they travel as one KV block.
struct HeadClass {
  std::int64_t head_offset = 0;    ///< what the head contributes to the offset, under OffsetRule::head and head_block; else 0
  Progression kv;                  ///< the KV heads of the class
  std::vector<HeadSet> head_sets;  ///< the class's query heads; more than one only where the branch cuts a KV head's group
};

/// Query heads of branch `branch` under the pattern's head split.
HeadRange heads_of_branch(const Problem& problem, const Pattern& pattern, std::int64_t branch);

/// The head classes of a branch; none if no head runs it.
std::vector<HeadClass> head_classes(const Problem& problem, const Pattern& pattern, std::int64_t branch);

/// Offset o in [0, r) of a head class in a segment.
std::int64_t segment_offset(const Pattern& pattern, std::int64_t branch, std::int64_t segment, const HeadClass& heads);

/// Number of segments of a branch.
std::int64_t segment_count(std::int64_t seq_len, const Branch& branch);

/// Global tokens [s*w, min((s+1)*w, seq_len)) of a segment.
Progression segment_range(std::int64_t seq_len, const Branch& branch, std::int64_t segment);

/// Tokens from one row of a segment to the next: the dilation rate, or 1 in a tail that is attended undilated (Ragged::dense_tail). A row
/// that was turned over (Ragged::wrap) stands by itself.
std::int64_t row_distance(std::int64_t seq_len, const Pattern& pattern, std::int64_t branch, std::int64_t segment);

/// I(branch, segment, head class) in global rows, ascending: { s*w + o + t*r } within the segment, one run. Under Ragged::wrap a segment of
/// L rows has ceil(L / r) of them, at (o + t*r) mod L. Two of these are less than L apart, so only the last can turn over, and it lands
/// before all the others: it comes first, as a run of its own.
Rows<Global> segment_rows(std::int64_t seq_len, const Pattern& pattern, std::int64_t branch, std::int64_t segment, const HeadClass& heads);

/// Places in a segment, counted in rows of the branch, of a run of its rows. Rows take places 0, 1, ... in order; a row that wrap turned
/// over has a block of its own before them, so that the blocks of the others are those of a segment in which nothing turns over: it takes
/// place block_rows - 1, and the others begin at block_rows.
/// @param rows  segment_rows() of the segment @param run  some of the rows of one of its runs
Progression segment_places(const Rows<Global>& rows, const Progression& run, std::int64_t block_rows);

/// How many keys of zeros, with values of zeros, the rows of a segment see besides its own: what a segment of min(w, seq_len) rows, padded
/// to a multiple of the dilation rate, would hold more (Ragged::zero_keys). They come after all rows, so a causal mask hides them.
/// @param rows  segment_rows() of the segment
std::int64_t zero_keys(const Problem& problem, const Pattern& pattern, std::int64_t branch, const Rows<Global>& rows);

/// Segments of equal length repeat their offset after this many: 1, or r where the offset depends on the segment.
std::int64_t offset_period(const Pattern& pattern, std::int64_t branch);

/// Whether each head runs at most one branch, so that one running partial serves every mixing.
bool one_branch_per_head(const Pattern& pattern);

/// What O is multiplied by at the end: 1, or 1 / branches.
double output_scale(const Pattern& pattern);

/// Partials the executor keeps for each row: 1, or one per branch.
std::int64_t partial_count(const Pattern& pattern);

}  // namespace annulus
