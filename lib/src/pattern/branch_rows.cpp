// SPDX-License-Identifier: Apache-2.0
#include <annulus/pattern/branch_rows.hpp>

#include <annulus/core/error.hpp>

namespace annulus {

HeadRange heads_of_branch(const Problem& problem, const Pattern& pattern, std::int64_t branch) {
  const auto branches = static_cast<std::int64_t>(pattern.branches.size());
  ANNULUS_EXPECTS(branch >= 0 && branch < branches, "branch {} is outside 0..{}", branch, branches - 1);
  if (pattern.head_split == HeadSplit::all) { return {0, problem.heads}; }
  const std::int64_t base = problem.all_heads() / branches;
  const std::int64_t spare = problem.all_heads() % branches;
  // Branches [first_larger, first_larger + spare) take one head more.
  const std::int64_t first_larger = pattern.head_split == HeadSplit::first ? 0 : branches - spare;
  const std::int64_t larger_before = std::clamp<std::int64_t>(branch - first_larger, 0, spare);
  const bool larger = branch >= first_larger && branch < first_larger + spare;
  const std::int64_t first = branch * base + larger_before - problem.window.first;
  const Progression here = intersect(range(first, first + base + (larger ? 1 : 0)), range(0, problem.heads));
  return {here.empty() ? 0 : here.first, here.count};
}

namespace {

/// Query heads of the KV heads `kv` that lie in `heads`, as sets with equally many query heads per KV head: the KV heads at the two ends
/// may be cut by the range.
std::vector<HeadSet> head_sets(const HeadRange& heads, const Progression& kv, std::int64_t group_size) {
  std::vector<HeadSet> sets;
  for (std::int64_t index = 0; index < kv.count; ++index) {
    const std::int64_t begin = std::max(heads.first, kv[index] * group_size);
    const std::int64_t end = std::min(heads.end(), (kv[index] + 1) * group_size);
    const std::int64_t offset_in_group = begin - kv[index] * group_size;
    const bool continues =
        !sets.empty() && sets.back().q_per_kv == end - begin && sets.back().q_first - sets.back().kv.first * group_size == offset_in_group;
    if (continues) {
      ++sets.back().kv.count;
    } else {
      sets.push_back({{kv[index], kv.stride, 1}, begin, end - begin});
    }
  }
  return sets;
}

}  // namespace

std::vector<HeadClass> head_classes(const Problem& problem, const Pattern& pattern, std::int64_t branch) {
  const HeadRange heads = heads_of_branch(problem, pattern, branch);
  if (heads.count == 0) { return {}; }
  const std::int64_t group_size = problem.group_size();
  const Progression kv_heads = range(heads.first / group_size, (heads.end() - 1) / group_size + 1);
  std::vector<HeadClass> classes;
  const auto add = [&](std::int64_t offset, const Progression& kv) { classes.push_back({offset, kv, head_sets(heads, kv, group_size)}); };
  const std::int64_t rate = pattern.branches[static_cast<std::size_t>(branch)].dilation_rate;
  switch (pattern.offset) {
    case OffsetRule::group:
    case OffsetRule::group_plus_segment:
    case OffsetRule::segment:
      add(0, kv_heads);
      break;
    case OffsetRule::head:
      for (std::int64_t lead = 0; lead < std::min(rate, kv_heads.count); ++lead) {
        const std::int64_t first = kv_heads.first + lead;
        add((problem.first_kv_head() + first) % rate, {first, rate, (kv_heads.last() - first) / rate + 1});
      }
      break;
    case OffsetRule::head_block: {
      const std::int64_t block = ceil_div(problem.all_kv_heads(), rate);
      const std::int64_t before = problem.first_kv_head();
      for (std::int64_t offset = (before + kv_heads.first) / block; offset * block <= before + kv_heads.last(); ++offset) {
        const Progression kv = intersect(kv_heads, range(offset * block - before, (offset + 1) * block - before));
        if (!kv.empty()) { add(offset, kv); }
      }
      break;
    }
  }
  return classes;
}

std::int64_t segment_offset(const Pattern& pattern, std::int64_t branch, std::int64_t segment, const HeadClass& heads) {
  const std::int64_t rate = pattern.branches[static_cast<std::size_t>(branch)].dilation_rate;
  switch (pattern.offset) {
    case OffsetRule::group:
      return branch % rate;
    case OffsetRule::group_plus_segment:
      return (branch + segment) % rate;
    case OffsetRule::segment:
      return segment % rate;
    case OffsetRule::head:
    case OffsetRule::head_block:
      break;
  }
  return heads.head_offset;
}

std::int64_t segment_count(std::int64_t seq_len, const Branch& branch) { return ceil_div(seq_len, branch.segment_length); }

Progression segment_range(std::int64_t seq_len, const Branch& branch, std::int64_t segment) {
  const std::int64_t begin = segment * branch.segment_length;
  return range(begin, std::min(begin + branch.segment_length, seq_len));
}

std::int64_t row_distance(std::int64_t seq_len, const Pattern& pattern, std::int64_t branch, std::int64_t segment) {
  const Branch& shape = pattern.branches[static_cast<std::size_t>(branch)];
  switch (pattern.ragged) {
    case Ragged::short_stride:
    case Ragged::wrap:
    case Ragged::truncate:
    case Ragged::zero_keys:
    case Ragged::reject:
      return shape.dilation_rate;
    case Ragged::dense_tail:
      break;
  }
  return segment_range(seq_len, shape, segment).count < shape.segment_length ? 1 : shape.dilation_rate;
}

namespace {

/// (o + t*r) mod L, t < ceil(L / r), of the L >= 1 tokens of a segment; 0 <= o < r.
///
/// With n = ceil(L / r) >= 2 rows, L > (n - 1) r: the last one, o + (n - 1) r < L + o, turns over at most once and then lands below o,
/// where none of the others is; those end at o + (n - 2) r < L. One row alone may turn over more often.
Rows<Global> wrapped_rows(const Progression& tokens, std::int64_t rate, std::int64_t offset) {
  const std::int64_t length = tokens.count;
  const std::int64_t count = ceil_div(length, rate);
  if (count == 1) { return Rows<Global>({tokens.first + offset % length, 1, 1}); }
  const std::int64_t last = offset + (count - 1) * rate;
  Rows<Global> rows;
  if (last >= length) { rows.append({tokens.first + last - length, 1, 1}); }
  rows.append({tokens.first + offset, rate, last < length ? count : count - 1});
  return rows;
}

}  // namespace

Rows<Global> segment_rows(std::int64_t seq_len, const Pattern& pattern, std::int64_t branch, std::int64_t segment, const HeadClass& heads) {
  const Branch& shape = pattern.branches[static_cast<std::size_t>(branch)];
  const Progression tokens = segment_range(seq_len, shape, segment);
  const std::int64_t rate = row_distance(seq_len, pattern, branch, segment);
  const std::int64_t offset = segment_offset(pattern, branch, segment, heads) % rate;
  if (pattern.ragged == Ragged::wrap) { return wrapped_rows(tokens, rate, offset); }
  if (offset >= tokens.count) { return {}; }
  Progression rows{tokens.first + offset, rate, (tokens.count - 1 - offset) / rate + 1};
  switch (pattern.ragged) {
    case Ragged::truncate:
      rows.count = std::min(rows.count, tokens.count / rate);
      break;
    case Ragged::short_stride:
    case Ragged::wrap:
    case Ragged::dense_tail:
    case Ragged::zero_keys:
    case Ragged::reject:
      break;
  }
  return Rows<Global>(rows);
}

Progression segment_places(const Rows<Global>& rows, const Progression& run, std::int64_t block_rows) {
  const bool turned_over = rows.runs() > 1;
  if (turned_over && rows.run(0).contains(run.first)) { return {block_rows - 1, 1, 1}; }
  Progression places = indices_of(run, rows.run(rows.runs() - 1));
  places.first += turned_over ? block_rows : 0;
  return places;
}

std::int64_t zero_keys(const Problem& problem, const Pattern& pattern, std::int64_t branch, const Rows<Global>& rows) {
  switch (pattern.ragged) {
    case Ragged::short_stride:
    case Ragged::wrap:
    case Ragged::truncate:
    case Ragged::dense_tail:
    case Ragged::reject:
      return 0;
    case Ragged::zero_keys:
      break;
  }
  if (problem.causal || rows.empty()) { return 0; }
  const Branch& shape = pattern.branches[static_cast<std::size_t>(branch)];
  return ceil_div(std::min(shape.segment_length, problem.seq_len), shape.dilation_rate) - rows.count();
}

std::int64_t offset_period(const Pattern& pattern, std::int64_t branch) {
  const bool by_segment = pattern.offset == OffsetRule::segment || pattern.offset == OffsetRule::group_plus_segment;
  return by_segment ? pattern.branches[static_cast<std::size_t>(branch)].dilation_rate : 1;
}

bool one_branch_per_head(const Pattern& pattern) { return pattern.branches.size() == 1 || pattern.head_split != HeadSplit::all; }

double output_scale(const Pattern& pattern) { return pattern.scale_by_branches ? 1.0 / static_cast<double>(pattern.branches.size()) : 1.0; }

std::int64_t partial_count(const Pattern& pattern) {
  return pattern.mixing == Mixing::lse || one_branch_per_head(pattern) ? 1 : static_cast<std::int64_t>(pattern.branches.size());
}

}  // namespace annulus
