// SPDX-License-Identifier: Apache-2.0
// Shares nothing with lib/pattern or lib/plan: whether a token is selected is asked of every token, from the definition of the operator.
#include <annulus/verify/oracle.hpp>

#include <annulus/core/error.hpp>
#include <annulus/kernels/dtype.hpp>

#include "definition.hpp"
#include "in_order.hpp"
#include "order_table.hpp"
#include "parallel.hpp"
#include "rounding.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <vector>

namespace annulus {
namespace {

constexpr std::int64_t kTileKeys = 64;                         // keys scored at a time; K, V of a tile stay in L2 at head_dim 256 in fp64
constexpr std::int64_t kLanes = 16;                            // scores kept in registers at a time
constexpr std::int64_t kBlockRows = 32;                        // query rows that share a tile's conversion
constexpr std::int64_t kWindowBytes = std::int64_t{32} << 20;  // of K, and of V, in memory at a time

static_assert(kTileKeys % kLanes == 0);

// ---- Numbers ----

/// scores[j] = scale * <query, key j> for j < count, up to the next multiple of kLanes. Each sum runs in the natural order of head_dim: the
/// lanes are different keys.
template <class Real>
void score_tile(const Real* __restrict query, const Real* __restrict keys_by_dim, std::int64_t head_dim, Real scale, std::int64_t count,
                Real* __restrict scores) {
  for (std::int64_t first = 0; first < count; first += kLanes) {
    Real sums[kLanes] = {};
    for (std::int64_t d = 0; d < head_dim; ++d) {
      const Real factor = query[d];
      const Real* __restrict keys = keys_by_dim + d * kTileKeys + first;
      for (std::int64_t lane = 0; lane < kLanes; ++lane) { sums[lane] += factor * keys[lane]; }
    }
    for (std::int64_t lane = 0; lane < kLanes; ++lane) { scores[first + lane] = scale * sums[lane]; }
  }
}

/// acc += sum over j of weights[j] * values[j], one key after the other.
template <class Real>
void add_weighted(const Real* __restrict weights, const Real* __restrict values, std::int64_t count, std::int64_t head_dim,
                  Real* __restrict acc) {
  std::int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const Real* __restrict v = values + j * head_dim;
    for (std::int64_t d = 0; d < head_dim; ++d) {
      Real sum = acc[d] + weights[j] * v[d];
      sum += weights[j + 1] * v[head_dim + d];
      sum += weights[j + 2] * v[2 * head_dim + d];
      sum += weights[j + 3] * v[3 * head_dim + d];
      acc[d] = sum;
    }
  }
  for (; j < count; ++j) {
    for (std::int64_t d = 0; d < head_dim; ++d) { acc[d] += weights[j] * values[j * head_dim + d]; }
  }
}

/// ln(exp(a) + exp(b)).
double log_add(double a, double b) {
  const double larger = std::max(a, b);
  if (larger == -std::numeric_limits<double>::infinity()) { return larger; }
  return larger + std::log(std::exp(a - larger) + std::exp(b - larger));
}

/// One softmax of every (row, head): max and sum [row][head], acc [row][head][head_dim], un-normalised.
template <class Real>
struct Softmax {
  List<Real> max;
  List<Real> sum;
  List<Real> acc;

  void reset(std::int64_t row_heads, std::int64_t head_dim) {
    max.assign(row_heads, -std::numeric_limits<Real>::infinity());
    sum.assign(row_heads, Real{0});
    acc.assign(row_heads * head_dim, Real{0});
  }
};

/// K and V of the tokens [first, first+count) of one batch entry, as read.
class KeyWindow {
 public:
  KeyWindow(const TensorSource& source, const Problem& problem, const ExactRows* exact)
      : source_(source), problem_(problem), exact_(exact) {}

  std::int64_t token_elements() const { return problem_.kv_heads * problem_.head_dim; }
  std::int64_t token_bytes() const { return token_elements() * size_of(problem_.dtype); }
  std::int64_t capacity() const {
    const std::int64_t exact_bytes = exact_ == nullptr ? 0 : token_elements() * static_cast<std::int64_t>(sizeof(double));
    return std::max(kTileKeys, kWindowBytes / (token_bytes() + exact_bytes));
  }

  /// Tokens from seq_len on are the extra keys, which are not loaded together with others.
  void load(std::int64_t batch, std::int64_t first, std::int64_t count, bool with_values) {
    if (batch != batch_ || first != first_ || count != count_) {
      count_ = 0;  // nothing is held if a read throws
      has_values_ = false;
      read(Tensor::k, batch, first, count, keys_, exact_keys_);
      batch_ = batch;
      first_ = first;
      count_ = count;
    }
    if (with_values && !has_values_) {
      read(Tensor::v, batch, first, count, values_, exact_values_);
      has_values_ = true;
    }
  }

  std::int64_t first() const { return first_; }
  std::int64_t end() const { return first_ + count_; }
  void key(std::int64_t token, std::int64_t kv_head, float* dst) const { row(keys_, token, kv_head, dst); }
  void value(std::int64_t token, std::int64_t kv_head, float* dst) const { row(values_, token, kv_head, dst); }

  /// Whether there are other rows for the exact run, and these.
  bool is_exact() const { return exact_ != nullptr; }
  const double* exact_key(std::int64_t token, std::int64_t kv_head) const { return exact_keys_.data() + element_of(token, kv_head); }
  const double* exact_value(std::int64_t token, std::int64_t kv_head) const { return exact_values_.data() + element_of(token, kv_head); }

 private:
  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, List<std::byte>& into, List<double>& exact_into) {
    if (first >= problem_.seq_len) {
      tensor = tensor == Tensor::k ? Tensor::k_extra : Tensor::v_extra;
      first -= problem_.seq_len;
    }
    into.resize(count * token_bytes());
    source_.read(tensor, batch, first, count, problem_.dtype, into.data());
    if (exact_ == nullptr) { return; }
    exact_into.resize(count * token_elements());
    exact_->read(tensor, batch, first, count, exact_into.data());
  }
  std::int64_t element_of(std::int64_t token, std::int64_t kv_head) const {
    return ((token - first_) * problem_.kv_heads + kv_head) * problem_.head_dim;
  }
  void row(const List<std::byte>& from, std::int64_t token, std::int64_t kv_head, float* dst) const {
    const std::int64_t element = element_of(token, kv_head);
    widen(problem_.dtype, from.data() + element * size_of(problem_.dtype), problem_.head_dim, dst);
  }

  const TensorSource& source_;
  const Problem& problem_;
  const ExactRows* exact_;
  std::int64_t batch_ = -1;
  std::int64_t first_ = 0;
  std::int64_t count_ = 0;
  bool has_values_ = false;
  List<std::byte> keys_;
  List<std::byte> values_;
  List<double> exact_keys_;
  List<double> exact_values_;
};

/// Some rows of one segment and one head, against the keys of the window.
struct Unit {
  std::int64_t branch = 0;
  std::int64_t segment = 0;
  std::int64_t head = 0;
  std::int64_t first_row = 0;  // places in the sorted rows
  std::int64_t end_row = 0;
  double value_squares = 0;  // what came of it
  std::int64_t value_count = 0;
};

/// A worker's copies in both precisions; keys lie [head_dim][kTileKeys], values [kTileKeys][head_dim].
struct Scratch {
  List<std::int64_t> rows;
  List<std::int64_t> tile_tokens;
  List<float> row;
  List<float> queries32;
  List<double> queries64;
  List<float> keys32;
  List<double> keys64;
  List<float> values32;
  List<double> values64;
};

enum class Pass {
  maxima,  ///< the largest score of every row
  sums,    ///< the sums of exp(score - max) and of the values they weight
};

class Oracle {
 public:
  Oracle(const TensorSource& source, const Problem& problem, const Pattern& pattern, std::span<const RowId> rows, const CheckedHeads& heads,
         PlainProbabilities probabilities, int threads, std::atomic<std::uint64_t>* progress, const ExactRows* exact)
      : source_(source),
        exact_rows_(exact),
        problem_(problem),
        pattern_(pattern),
        rows_(rows.begin(), rows.end()),
        heads_(heads),
        probabilities_(probabilities),
        threads_(threads),
        progress_(progress),
        places_(rows.size()),
        window_(source, problem_, exact),
        scratch_(threads) {
    if (pattern_.branches.empty()) { pattern_.branches = {{problem_.seq_len, 1}}; }
    std::iota(places_.begin(), places_.end(), std::int64_t{0});
    std::sort(places_.begin(), places_.end(), [&](std::int64_t a, std::int64_t b) {
      const RowId& left = rows[a];
      const RowId& right = rows[b];
      return left.batch != right.batch ? left.batch < right.batch : left.row < right.row;
    });
    for (std::int64_t i = 0; i < row_count(); ++i) { rows_[i] = rows[places_[i]]; }
    max_score_.assign(row_heads(), 0.0);
    read_queries();
  }

  OracleRows compute() {
    const std::int64_t count = row_heads();
    const std::int64_t head_dim = problem_.head_dim;
    OracleRows total;  // in the order of the sorted rows
    total.out.assign(count * head_dim, 0.0);
    total.plain_out.assign(total.out.size(), 0.0F);
    total.scaled_out.assign(scales(), total.plain_out);
    scaled_acc_.resize(scales());
    total.lse.assign(count, -std::numeric_limits<double>::infinity());
    total.plain_lse = total.lse;
    List<std::int64_t> covering(count, 0);

    // `lse` mixing is one softmax over the keys of all branches and the extra ones; otherwise each branch has its own, over its keys and
    // the extra ones.
    const std::int64_t branches = std::ssize(pattern_.branches);
    const bool one_softmax = pattern_.mixing == Mixing::lse;
    const std::int64_t together = one_softmax ? branches : 1;
    for (std::int64_t first = 0; first < branches; first += together) {
      reset_softmax();
      run_pass(Pass::maxima, first, first + together);
      List<bool> sees(count, one_softmax);  // the extra keys, in this softmax
      for (std::int64_t i = 0; i < count; ++i) { sees[i] = sees[i] || exact_.max[i] > -std::numeric_limits<double>::infinity(); }
      run_extra_keys(Pass::maxima, sees);
      run_pass(Pass::sums, first, first + together);
      if (!one_softmax) { add_lse(total); }
      run_extra_keys(Pass::sums, sees);
      if (one_softmax) { add_lse(total); }
      for (std::int64_t i = 0; i < count; ++i) {
        if (exact_.sum[i] == 0.0) { continue; }  // no key: the softmax's largest term alone is 1
        ++covering[i];
        add_output(i, total);
      }
    }
    if (!one_softmax && problem_.extra_keys > 0) {
      // Once for the LSE of all rows, and for the output of those that see nothing else.
      reset_softmax();
      const List<bool> all(count, true);
      run_extra_keys(Pass::maxima, all);
      run_extra_keys(Pass::sums, all);
      add_lse(total);
      for (std::int64_t i = 0; i < count; ++i) {
        if (exact_.sum[i] > 0.0 && covering[i] == 0) { add_output(i, total); }
      }
    }

    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t averaged = pattern_.mixing == Mixing::mean ? std::max<std::int64_t>(1, covering[i]) : 1;
      const std::int64_t divisor = averaged * (pattern_.scale_by_branches ? branches : 1);
      for (std::int64_t d = i * head_dim; d < (i + 1) * head_dim; ++d) {
        const std::int64_t element = d;
        total.out[element] /= static_cast<double>(divisor);
        const auto rounded = [&](float sum) { return round_to(problem_.dtype, sum / static_cast<float>(divisor)); };
        total.plain_out[element] = rounded(total.plain_out[element]);
        for (std::vector<float>& out : total.scaled_out) { out[element] = rounded(out[element]); }
      }
    }
    total.max_score = max_score_;
    return in_callers_order(total);
  }

 private:
  void reset_softmax() {
    exact_.reset(row_heads(), problem_.head_dim);
    plain_.reset(row_heads(), problem_.head_dim);
    for (List<float>& acc : scaled_acc_) { acc.assign(plain_.acc.size(), 0.0F); }
  }

  /// Adds what the sums have come to to the LSE of all rows; a row without keys, whose maximum is -inf, gets nothing.
  void add_lse(OracleRows& total) const {
    for (std::int64_t i = 0; i < row_heads(); ++i) {
      if (exact_.sum[i] == 0.0) { continue; }
      total.lse[i] = log_add(total.lse[i], exact_.max[i] + std::log(exact_.sum[i]));
      total.plain_lse[i] = log_add(total.plain_lse[i], static_cast<double>(plain_.max[i] + std::log(plain_.sum[i])));
    }
  }

  /// Adds the softmax of one row and head to its output.
  void add_output(std::int64_t row_head, OracleRows& total) const {
    const std::int64_t head_dim = problem_.head_dim;
    for (std::int64_t element = row_head * head_dim; element < (row_head + 1) * head_dim; ++element) {
      total.out[element] += exact_.acc[element] / exact_.sum[row_head];
      total.plain_out[element] += plain_.acc[element] / plain_.sum[row_head];
      for (std::int64_t scale = 0; scale < scales(); ++scale) {
        total.scaled_out[scale][element] += scaled_acc_[scale][element] / plain_.sum[row_head];
      }
    }
  }

  std::int64_t scales() const { return probabilities_ == PlainProbabilities::rounded_at_scales ? kPlainScales : 0; }
  std::int64_t row_count() const { return std::ssize(rows_); }
  std::int64_t row_heads() const { return row_count() * problem_.heads; }

  void read_queries() {
    const std::int64_t row_bytes = problem_.heads * problem_.head_dim * size_of(problem_.dtype);
    queries_.resize(row_count() * row_bytes);
    if (exact_rows_ != nullptr) { exact_queries_.resize(row_count() * problem_.heads * problem_.head_dim); }
    for (std::int64_t first = 0; first < row_count();) {
      const RowId& start = rows_[first];
      std::int64_t end = first + 1;
      while (end < row_count() && rows_[end].batch == start.batch && rows_[end].row == start.row + (end - first)) { ++end; }
      source_.read(Tensor::q, start.batch, start.row, end - first, problem_.dtype, queries_.data() + first * row_bytes);
      if (exact_rows_ != nullptr) {
        exact_rows_->read(Tensor::q, start.batch, start.row, end - first,
                          exact_queries_.data() + first * problem_.heads * problem_.head_dim);
      }
      first = end;
    }
  }

  void run_pass(Pass pass, std::int64_t first_branch, std::int64_t end_branch) {
    for (std::int64_t first = 0; first < row_count();) {
      std::int64_t end = first;
      while (end < row_count() && rows_[end].batch == rows_[first].batch) { ++end; }
      for (std::int64_t branch = first_branch; branch < end_branch; ++branch) { run_branch(pass, branch, first, end); }
      first = end;
    }
  }

  /// Rows [first, end) of one batch entry. Neighbouring segments that fit the window together are read together.
  void run_branch(Pass pass, std::int64_t branch, std::int64_t first, std::int64_t end) {
    const std::int64_t length = pattern_.branches[branch].segment_length;
    const auto segment_of = [&](std::int64_t place) { return rows_[place].row / length; };
    const auto segment_end = [&](std::int64_t segment) {
      const std::int64_t begin = segment * length;
      return length < problem_.seq_len - begin ? begin + length : problem_.seq_len;
    };
    while (first < end) {
      const std::int64_t keys_begin = segment_of(first) * length;
      std::int64_t keys_end = segment_end(segment_of(first));
      std::int64_t last_segment = segment_of(first);
      std::int64_t group_end = first;
      for (; group_end < end; ++group_end) {
        const std::int64_t segment = segment_of(group_end);
        if (segment == last_segment) { continue; }
        if (segment != last_segment + 1 || segment_end(segment) - keys_begin > window_.capacity()) { break; }
        last_segment = segment;
        keys_end = segment_end(segment);
      }
      for (std::int64_t key = keys_begin; key < keys_end; key += window_.capacity()) {
        if (is_masked(problem_, rows_[group_end - 1].batch, rows_[group_end - 1].row, key)) { break; }
        window_.load(rows_[first].batch, key, std::min(window_.capacity(), keys_end - key), pass == Pass::sums);
        run_units(pass, branch, first, group_end);
      }
      first = group_end;
    }
  }

  void run_units(Pass pass, std::int64_t branch, std::int64_t first, std::int64_t end) {
    const Branch& shape = pattern_.branches[branch];
    const std::int64_t block =
        kBlockRows * std::min<std::int64_t>(shape.dilation_rate, kTileKeys);  // about kBlockRows of them are selected
    List<Unit> units;
    while (first < end) {
      const std::int64_t segment = rows_[first].row / shape.segment_length;
      std::int64_t block_end = first;
      while (block_end < std::min(end, first + block) && rows_[block_end].row / shape.segment_length == segment) { ++block_end; }
      for (std::int64_t head = heads_.first; head < heads_.first + heads_.count; ++head) {
        if (head_runs_branch(problem_, pattern_, branch, head)) { units.push_back({branch, segment, head, first, block_end, 0.0, 0}); }
      }
      first = block_end;
    }
    for_each_parallel(std::ssize(units), threads_, [&](std::int64_t worker, std::int64_t index) {
      run_unit(pass, units[index], scratch_[worker]);
      if (progress_ != nullptr) { progress_->fetch_add(1, std::memory_order_relaxed); }
    });
    for (const Unit& unit : units) {
      value_squares_ += unit.value_squares;
      value_count_ += unit.value_count;
    }
  }

  void run_unit(Pass pass, Unit& unit, Scratch& scratch) {
    const Branch& branch = pattern_.branches[unit.branch];
    const std::int64_t offset = offset_of(problem_, pattern_, unit.branch, unit.segment, unit.head);
    scratch.rows.clear();
    for (std::int64_t place = unit.first_row; place < unit.end_row; ++place) {
      if (is_selected(problem_, pattern_, branch, unit.segment, offset, rows_[place].row)) { scratch.rows.push_back(place); }
    }
    if (scratch.rows.empty()) { return; }
    load_queries(unit.head, scratch);
    const std::int64_t zeros = zero_slots(problem_, pattern_, branch, unit.segment, offset);
    // Once for the segment, with its first keys.
    if (zeros > 0 && window_.first() <= unit.segment * branch.segment_length) { see_zero_keys(pass, unit.head, zeros, scratch); }

    const RowId& last_row = rows_[scratch.rows.back()];
    scratch.tile_tokens.clear();
    for (std::int64_t token = window_.first(); token < window_.end(); ++token) {
      if (is_masked(problem_, last_row.batch, last_row.row, token)) { break; }  // and so are all later ones, for all rows
      if (!is_selected(problem_, pattern_, branch, unit.segment, offset, token)) { continue; }
      scratch.tile_tokens.push_back(token);
      if (std::ssize(scratch.tile_tokens) == kTileKeys) { run_tile(pass, unit, scratch); }
    }
    if (!scratch.tile_tokens.empty()) { run_tile(pass, unit, scratch); }
  }

  /// The extra keys, for the rows and heads that `sees` names.
  void run_extra_keys(Pass pass, const List<bool>& sees) {
    const std::int64_t end_of_keys = problem_.seq_len + problem_.extra_keys;
    for (std::int64_t first = 0, end = 0; first < row_count(); first = end) {
      while (end < row_count() && rows_[end].batch == rows_[first].batch) { ++end; }
      for (std::int64_t key = problem_.seq_len; key < end_of_keys; key += window_.capacity()) {
        window_.load(rows_[first].batch, key, std::min(window_.capacity(), end_of_keys - key), pass == Pass::sums);
        List<Unit> units;
        for (std::int64_t row = first; row < end; row += kBlockRows) {
          for (std::int64_t head = heads_.first; head < heads_.first + heads_.count; ++head) {
            units.push_back({0, 0, head, row, std::min(end, row + kBlockRows), 0.0, 0});
          }
        }
        for_each_parallel(std::ssize(units), threads_, [&](std::int64_t worker, std::int64_t index) {
          Unit& unit = units[index];
          Scratch& scratch = scratch_[worker];
          scratch.rows.clear();
          for (std::int64_t place = unit.first_row; place < unit.end_row; ++place) {
            if (sees[place * problem_.heads + unit.head]) { scratch.rows.push_back(place); }
          }
          if (scratch.rows.empty()) { return; }
          load_queries(unit.head, scratch);
          scratch.tile_tokens.clear();
          for (std::int64_t token = window_.first(); token < window_.end(); ++token) {
            scratch.tile_tokens.push_back(token);
            if (std::ssize(scratch.tile_tokens) == kTileKeys || token + 1 == window_.end()) { run_tile(pass, unit, scratch); }
          }
          if (progress_ != nullptr) { progress_->fetch_add(1, std::memory_order_relaxed); }
        });
        for (const Unit& unit : units) {
          value_squares_ += unit.value_squares;
          value_count_ += unit.value_count;
        }
      }
    }
  }

  void load_queries(std::int64_t head, Scratch& scratch) const {
    const std::int64_t head_dim = problem_.head_dim;
    const std::int64_t elements = std::ssize(scratch.rows) * head_dim;
    scratch.queries32.resize(elements);
    for (std::int64_t i = 0; i < std::ssize(scratch.rows); ++i) {
      const std::int64_t element = (scratch.rows[i] * problem_.heads + head) * head_dim;
      widen(problem_.dtype, queries_.data() + element * size_of(problem_.dtype), head_dim, scratch.queries32.data() + i * head_dim);
    }
    scratch.queries64.assign(scratch.queries32.begin(), scratch.queries32.end());
    for (std::int64_t i = 0; exact_rows_ != nullptr && i < std::ssize(scratch.rows); ++i) {
      std::copy_n(exact_queries_.begin() + (scratch.rows[i] * problem_.heads + head) * head_dim, head_dim,
                  scratch.queries64.begin() + i * head_dim);
    }
  }

  /// The unit's rows against the tokens of the tile, which it then empties.
  void run_tile(Pass pass, Unit& unit, Scratch& scratch) {
    const std::int64_t head_dim = problem_.head_dim;
    const std::int64_t kv_head = unit.head * problem_.kv_heads / problem_.heads;
    const std::int64_t count = std::ssize(scratch.tile_tokens);
    const std::int64_t elements = kTileKeys * head_dim;
    scratch.row.resize(head_dim);
    scratch.keys32.assign(elements, 0.0F);
    for (std::int64_t j = 0; j < count; ++j) {
      window_.key(scratch.tile_tokens[j], kv_head, scratch.row.data());
      for (std::int64_t d = 0; d < head_dim; ++d) { scratch.keys32[d * kTileKeys + j] = scratch.row[d]; }
    }
    scratch.keys64.assign(scratch.keys32.begin(), scratch.keys32.end());
    for (std::int64_t j = 0; window_.is_exact() && j < count; ++j) {
      const double* key = window_.exact_key(scratch.tile_tokens[j], kv_head);
      for (std::int64_t d = 0; d < head_dim; ++d) { scratch.keys64[d * kTileKeys + j] = key[d]; }
    }
    if (pass == Pass::sums) {
      scratch.values32.resize(elements);
      for (std::int64_t j = 0; j < count; ++j) { window_.value(scratch.tile_tokens[j], kv_head, scratch.values32.data() + j * head_dim); }
      scratch.values64.assign(scratch.values32.begin(), scratch.values32.end());
      for (std::int64_t j = 0; window_.is_exact() && j < count; ++j) {
        std::copy_n(window_.exact_value(scratch.tile_tokens[j], kv_head), head_dim, scratch.values64.begin() + j * head_dim);
      }
      for (std::int64_t i = 0; i < count * head_dim; ++i) { unit.value_squares += scratch.values64[i] * scratch.values64[i]; }
      unit.value_count += count * head_dim;
    }

    for (std::int64_t i = 0; i < std::ssize(scratch.rows); ++i) {
      const std::int64_t place = scratch.rows[i];
      const RowId& row = rows_[place];
      std::int64_t visible = 0;  // tokens ascend, so that the visible ones come first
      while (visible < count && !is_masked(problem_, row.batch, row.row, scratch.tile_tokens[visible])) { ++visible; }
      if (visible == 0) { continue; }
      double scores64[kTileKeys];
      float scores32[kTileKeys];
      const std::int64_t query = i * head_dim;
      score_tile(scratch.queries64.data() + query, scratch.keys64.data(), head_dim, problem_.scale, visible, scores64);
      score_tile(scratch.queries32.data() + query, scratch.keys32.data(), head_dim, static_cast<float>(problem_.scale), visible, scores32);
      const std::int64_t row_head = place * problem_.heads + unit.head;
      if (pass == Pass::maxima) {
        update_maxima(row_head, scores64, scores32, visible);
      } else {
        const kernels::DropoutRow draws(problem_.dropout, row.batch, problem_.window.first + unit.head, row.row);
        update_sums(row_head, scores64, scores32, visible, draws, scratch);
      }
    }
    scratch.tile_tokens.clear();
  }

  /// Scores of 0, and nothing to add to acc.
  void see_zero_keys(Pass pass, std::int64_t head, std::int64_t count, const Scratch& scratch) {
    for (const std::int64_t place : scratch.rows) {
      const std::int64_t at = place * problem_.heads + head;
      if (pass == Pass::maxima) {
        exact_.max[at] = std::max(exact_.max[at], 0.0);
        plain_.max[at] = std::max(plain_.max[at], 0.0F);
      } else {
        exact_.sum[at] += static_cast<double>(count) * std::exp(-exact_.max[at]);
        plain_.sum[at] += static_cast<float>(count) * std::exp(-plain_.max[at]);
      }
    }
  }

  void update_maxima(std::int64_t row_head, const double* scores64, const float* scores32, std::int64_t count) {
    const std::int64_t at = row_head;
    for (std::int64_t j = 0; j < count; ++j) {
      max_score_[at] = std::max(max_score_[at], std::abs(scores64[j]));
      exact_.max[at] = std::max(exact_.max[at], scores64[j]);
      plain_.max[at] = std::max(plain_.max[at], scores32[j]);
    }
  }

  void update_sums(std::int64_t row_head, double* scores64, float* scores32, std::int64_t count, const kernels::DropoutRow& draws,
                   const Scratch& scratch) {
    const std::int64_t at = row_head;
    for (std::int64_t j = 0; j < count; ++j) {
      scores64[j] = std::exp(scores64[j] - exact_.max[at]);
      exact_.sum[at] += scores64[j];
      scores32[j] = std::exp(scores32[j] - plain_.max[at]);
      plain_.sum[at] += scores32[j];
      const double factor = draws.factor(scratch.tile_tokens[j]);
      scores64[j] *= factor;
      scores32[j] *= static_cast<float>(factor);
    }
    const std::int64_t head_dim = problem_.head_dim;
    float scaled32[kTileKeys];
    for (std::int64_t scale = 0; scale < scales(); ++scale) {
      const float factor = factor_of(row_head, scale);
      for (std::int64_t j = 0; j < count; ++j) { scaled32[j] = round_to(problem_.dtype, scores32[j] * factor) / factor; }
      add_weighted(scaled32, scratch.values32.data(), count, head_dim, scaled_acc_[scale].data() + row_head * head_dim);
    }
    if (probabilities_ != PlainProbabilities::kept) {
      for (std::int64_t j = 0; j < count; ++j) { scores32[j] = round_to(problem_.dtype, scores32[j]); }
    }
    add_weighted(scores64, scratch.values64.data(), count, head_dim, exact_.acc.data() + row_head * head_dim);
    add_weighted(scores32, scratch.values32.data(), count, head_dim, plain_.acc.data() + row_head * head_dim);
  }

  /// In [1, 2): another one for each row, so that a large problem meets them all.
  float factor_of(std::int64_t row_head, std::int64_t scale) const {
    const RowId& id = rows_[row_head / problem_.heads];
    const double number = static_cast<double>((id.batch * problem_.seq_len + id.row) * problem_.heads + row_head % problem_.heads);
    const double share = number * 0.6180339887498949 + static_cast<double>(scale) / kPlainScales;
    return static_cast<float>(std::exp2(share - std::floor(share)));
  }

  OracleRows in_callers_order(const OracleRows& sorted) const {
    OracleRows result = sorted;
    const std::int64_t heads = problem_.heads;
    const std::int64_t row_elements = heads * problem_.head_dim;
    for (std::int64_t place = 0; place < row_count(); ++place) {
      const std::int64_t row = places_[place];
      std::copy_n(sorted.out.begin() + place * row_elements, row_elements, result.out.begin() + row * row_elements);
      std::copy_n(sorted.plain_out.begin() + place * row_elements, row_elements, result.plain_out.begin() + row * row_elements);
      for (std::int64_t scale = 0; scale < scales(); ++scale) {
        std::copy_n(sorted.scaled_out[scale].begin() + place * row_elements, row_elements,
                    result.scaled_out[scale].begin() + row * row_elements);
      }
      std::copy_n(sorted.lse.begin() + place * heads, heads, result.lse.begin() + row * heads);
      std::copy_n(sorted.plain_lse.begin() + place * heads, heads, result.plain_lse.begin() + row * heads);
      std::copy_n(sorted.max_score.begin() + place * heads, heads, result.max_score.begin() + row * heads);
    }
    result.value_squares = value_squares_;
    result.value_count = value_count_;
    return result;
  }

  const TensorSource& source_;
  const ExactRows* exact_rows_;
  Problem problem_;
  Pattern pattern_;
  List<RowId> rows_;  // sorted by batch and row
  CheckedHeads heads_;
  PlainProbabilities probabilities_;
  int threads_;
  std::atomic<std::uint64_t>* progress_;
  List<std::int64_t> places_;  // rows_[i] is the caller's rows[places_[i]]
  KeyWindow window_;
  List<Scratch> scratch_;
  List<std::byte> queries_;     // [row][head][head_dim], as read
  List<double> exact_queries_;  // the same for the exact run, if it has its own
  Softmax<double> exact_;
  Softmax<float> plain_;
  List<List<float>> scaled_acc_;
  List<double> max_score_;
  double value_squares_ = 0;
  std::int64_t value_count_ = 0;
};

}  // namespace

OracleRows oracle_rows(const TensorSource& source, const Problem& problem, const Pattern& pattern, std::span<const RowId> rows,
                       PlainProbabilities probabilities, int threads, std::atomic<std::uint64_t>* progress) {
  return oracle_rows(source, problem, pattern, rows, {0, problem.heads}, probabilities, threads, progress);
}

OracleRows oracle_rows(const TensorSource& source, const Problem& problem, const Pattern& pattern, std::span<const RowId> rows,
                       const CheckedHeads& heads, PlainProbabilities probabilities, int threads, std::atomic<std::uint64_t>* progress,
                       const ExactRows* exact) {
  validate(problem);
  if (!pattern.branches.empty()) { validate(pattern); }
  const Problem& held = source.problem();
  ANNULUS_EXPECTS(
      held.batch == problem.batch && held.seq_len == problem.seq_len && held.heads == problem.heads && held.kv_heads == problem.kv_heads &&
          held.head_dim == problem.head_dim && held.extra_keys == problem.extra_keys,
      "{} holds batch {}, seq_len {}, heads {}, kv_heads {}, head_dim {}, {} extra keys; the problem to check has {}, {}, {}, {}, "
      "{}, {}",
      source.describe(), held.batch, held.seq_len, held.heads, held.kv_heads, held.head_dim, held.extra_keys, problem.batch,
      problem.seq_len, problem.heads, problem.kv_heads, problem.head_dim, problem.extra_keys);
  ANNULUS_EXPECTS(heads.first >= 0 && heads.count >= 0 && heads.count <= problem.heads - heads.first, "heads {}..{} are outside 0..{}",
                  heads.first, heads.first + heads.count, problem.heads);
  ANNULUS_EXPECTS(threads >= 1, "the oracle was given {} threads; it needs at least 1", threads);
  for (const RowId& id : rows) {
    ANNULUS_EXPECTS(id.batch >= 0 && id.batch < problem.batch && id.row >= 0 && id.row < problem.seq_len,
                    "row {} of batch {} lies outside batch {} x seq_len {}", id.row, id.batch, problem.batch, problem.seq_len);
  }
  if (pattern.order == SequenceOrder::linear) {
    return Oracle(source, problem, pattern, rows, heads, probabilities, threads, progress, exact).compute();
  }
  ANNULUS_EXPECTS(exact == nullptr, "rows of its own for the exact run have no other order than linear");
  ANNULUS_EXPECTS(!problem.causal, "a causal mask has no meaning in the order {}", to_string(pattern.order));
  const List<std::int64_t> positions(position_table(pattern.order, problem.seq_len));
  List<RowId> permuted(rows.begin(), rows.end());
  for (RowId& id : permuted) { id.row = positions[id.row]; }
  const InOrder in_order(source, pattern.order);
  return Oracle(in_order, problem, pattern, permuted, heads, probabilities, threads, progress, nullptr).compute();
}

}  // namespace annulus
