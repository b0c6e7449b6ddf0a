// SPDX-License-Identifier: Apache-2.0
#include <annulus/verify/gradient_oracle.hpp>

#include <annulus/core/error.hpp>
#include <annulus/pattern/progression.hpp>

#include "definition.hpp"
#include "in_order.hpp"
#include "parallel.hpp"
#include "rounding.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

namespace annulus {
namespace {

constexpr std::int64_t kLanes = 8;                           // sums of a product that run side by side
constexpr std::int64_t kQueriesAtATime = 16;                 // of a thread
constexpr std::int64_t kReadBytes = std::int64_t{16} << 20;  // of all heads of a tensor at a time

template <class Real>
Real dot(const Real* __restrict a, const Real* __restrict b, std::int64_t count) {
  Real lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) { lanes[lane] += a[i + lane] * b[i + lane]; }
  }
  Real sum = 0;
  for (; i < count; ++i) { sum += a[i] * b[i]; }
  for (const Real lane : lanes) { sum += lane; }
  return sum;
}

template <class Real>
void add_scaled(Real factor, const Real* __restrict what, std::int64_t count, Real* __restrict to) {
  for (std::int64_t i = 0; i < count; ++i) { to[i] += factor * what[i]; }
}

/// Rows of one head of the whole sequence, [seq_len][head_dim].
template <class Real>
using HeadRows = List<Real>;

/// A segment of a branch, as one head has it.
struct Segment {
  std::int64_t branch = 0;
  List<std::int64_t> tokens;  ///< selected, ascending
  std::int64_t zeros = 0;     ///< keys of zeros
};

/// What is asked for of one batch entry.
struct Asked {
  std::int64_t batch = 0;
  List<std::int64_t> places;  ///< in the caller's rows
  List<bool> row;             ///< by token: whether it is asked for
};

/// One batch entry and one query head: everything in one precision.
template <class Real>
class HeadGradients {
 public:
  HeadGradients(const Problem& problem, const Pattern& pattern, PlainProbabilities probabilities, const Asked& asked, std::int64_t head,
                int threads, const HeadRows<Real>& q, const HeadRows<Real>& k, const HeadRows<Real>& v, const HeadRows<Real>& dout)
      : problem_(problem),
        pattern_(pattern),
        rounds_(std::is_same_v<Real, float> && probabilities != PlainProbabilities::kept),
        asked_(asked),
        head_(head),
        threads_(threads),
        q_(q),
        k_(k),
        v_(v),
        dout_(dout) {
    list_segments();
  }

  /// Adds to dq, dk and dv, [seq_len][head_dim]; only rows that are asked for are complete.
  void add(HeadRows<Real>& dq, HeadRows<Real>& dk, HeadRows<Real>& dv) {
    attend();
    for (const Segment& segment : segments_) { differentiate(segment, dq, dk, dv); }
  }

  double max_score() const { return max_score_; }

 private:
  /// One softmax of every row: over all branches' keys, or one for each branch.
  struct Softmax {
    List<Real> max;
    List<Real> sum;
    List<Real> acc;
    List<Real> delta;  ///< <dO, O>
  };

  std::int64_t softmax_of(std::int64_t branch) const { return pattern_.mixing == Mixing::lse ? 0 : branch; }
  const Real* row(const HeadRows<Real>& rows, std::int64_t token) const { return rows.data() + token * problem_.head_dim; }
  Real* row(HeadRows<Real>& rows, std::int64_t token) const { return rows.data() + token * problem_.head_dim; }

  kernels::DropoutRow draws_of(std::int64_t query) const { return {problem_.dropout, asked_.batch, problem_.window.first + head_, query}; }
  /// What the probability of a key is multiplied by where it meets the value.
  Real factor_of(const kernels::DropoutRow& draws, std::int64_t key) const { return static_cast<Real>(draws.factor(key)); }

  /// What a product takes of a number.
  Real operand(Real value) const { return rounds_ ? static_cast<Real>(round_to(problem_.dtype, static_cast<float>(value))) : value; }

  void list_segments() {
    needed_.assign(problem_.seq_len, false);
    for (std::int64_t branch = 0; branch < std::ssize(pattern_.branches); ++branch) {
      if (!head_runs_branch(problem_, pattern_, branch, head_)) { continue; }
      const Branch& shape = pattern_.branches[branch];
      for (std::int64_t number = 0; number <= (problem_.seq_len - 1) / shape.segment_length; ++number) {
        Segment segment;
        segment.branch = branch;
        const std::int64_t offset = offset_of(problem_, pattern_, branch, number, head_);
        const std::int64_t begin = number * shape.segment_length;
        const std::int64_t end = shape.segment_length < problem_.seq_len - begin ? begin + shape.segment_length : problem_.seq_len;
        bool asked = false;
        for (std::int64_t token = begin; token < end; ++token) {
          if (!is_selected(problem_, pattern_, shape, number, offset, token)) { continue; }
          segment.tokens.push_back(token);
          asked = asked || asked_.row[token];
        }
        segment.zeros = zero_slots(problem_, pattern_, shape, number, offset);
        // Queries of a segment give gradients to its keys.
        for (const std::int64_t token : segment.tokens) { needed_[token] = needed_[token] || asked; }
        segments_.push_back(std::move(segment));
      }
    }
  }

  /// Keys of the segment that a query sees: its first ones.
  std::int64_t visible(const Segment& segment, std::int64_t query) const {
    const auto masked = std::partition_point(segment.tokens.begin(), segment.tokens.end(),
                                             [&](std::int64_t key) { return !is_masked(problem_, asked_.batch, query, key); });
    return masked - segment.tokens.begin();
  }

  Real score(std::int64_t query, std::int64_t key) const {
    return static_cast<Real>(problem_.scale) * dot(row(q_, query), row(k_, key), problem_.head_dim);
  }

  /// Calls visit(worker, query) for the segment's queries that are needed, by several threads: what is kept of a query is its own.
  template <class Visit>
  void for_each_needed(const Segment& segment, const Visit& visit) {
    const std::int64_t queries = std::ssize(segment.tokens);
    for_each_parallel(ceil_div(queries, kQueriesAtATime), threads_, [&](std::int64_t worker, std::int64_t part) {
      const std::int64_t end = std::min((part + 1) * kQueriesAtATime, queries);
      for (std::int64_t i = part * kQueriesAtATime; i < end; ++i) {
        if (needed_[segment.tokens[i]]) { visit(worker, segment.tokens[i]); }
      }
    });
  }

  /// The forward pass of all rows that are needed: maxima first, then sums.
  void attend() {
    const std::int64_t softmaxes = pattern_.mixing == Mixing::lse ? 1 : std::ssize(pattern_.branches);
    softmaxes_.resize(softmaxes);
    for (Softmax& softmax : softmaxes_) {
      softmax.max.assign(problem_.seq_len, -std::numeric_limits<Real>::infinity());
      softmax.sum.assign(problem_.seq_len, Real{0});
      softmax.acc.assign(problem_.seq_len * problem_.head_dim, Real{0});
      softmax.delta.assign(problem_.seq_len, Real{0});
    }
    List<double> max_scores(std::max(1, threads_), 0.0);
    for (const Segment& segment : segments_) {
      for_each_needed(segment, [&](std::int64_t worker, std::int64_t query) {
        Real& max = softmaxes_[softmax_of(segment.branch)].max[query];
        if (segment.zeros > 0) { max = std::max(max, Real{0}); }
        const std::int64_t keys = visible(segment, query);
        for (std::int64_t j = 0; j < keys; ++j) {
          const Real found = score(query, segment.tokens[j]);
          max = std::max(max, found);
          max_scores[worker] = std::max(max_scores[worker], std::abs(static_cast<double>(found)));
        }
      });
    }
    for (const double score : max_scores) { max_score_ = std::max(max_score_, score); }
    for (const Segment& segment : segments_) {
      for_each_needed(segment, [&](std::int64_t /*worker*/, std::int64_t query) {
        Softmax& softmax = softmaxes_[softmax_of(segment.branch)];
        if (segment.zeros > 0) { softmax.sum[query] += static_cast<Real>(segment.zeros) * std::exp(-softmax.max[query]); }
        const std::int64_t keys = visible(segment, query);
        const kernels::DropoutRow draws = draws_of(query);
        for (std::int64_t j = 0; j < keys; ++j) {
          const Real probability = std::exp(score(query, segment.tokens[j]) - softmax.max[query]);
          softmax.sum[query] += probability;
          add_scaled(factor_of(draws, segment.tokens[j]) * operand(probability), row(v_, segment.tokens[j]), problem_.head_dim,
                     row(softmax.acc, query));
        }
      });
    }
    factor_.assign(problem_.seq_len, Real{0});
    for (std::int64_t query = 0; query < problem_.seq_len; ++query) {
      std::int64_t covering = 0;
      for (Softmax& softmax : softmaxes_) {
        if (softmax.sum[query] == Real{0}) { continue; }
        ++covering;
        softmax.delta[query] = dot(row(softmax.acc, query), row(dout_, query), problem_.head_dim) / softmax.sum[query];
      }
      const std::int64_t averaged = pattern_.mixing == Mixing::mean ? std::max<std::int64_t>(1, covering) : 1;
      const std::int64_t divisor = averaged * (pattern_.scale_by_branches ? std::ssize(pattern_.branches) : 1);
      factor_[query] = Real{1} / static_cast<Real>(divisor);
    }
  }

  void differentiate(const Segment& segment, HeadRows<Real>& dq, HeadRows<Real>& dk, HeadRows<Real>& dv) const {
    const Softmax& softmax = softmaxes_[softmax_of(segment.branch)];
    const std::int64_t head_dim = problem_.head_dim;
    for (const std::int64_t query : segment.tokens) {
      if (!needed_[query] || softmax.sum[query] == Real{0}) { continue; }
      const std::int64_t keys = visible(segment, query);
      const kernels::DropoutRow draws = draws_of(query);
      for (std::int64_t j = 0; j < keys; ++j) {
        const std::int64_t key = segment.tokens[j];
        if (!asked_.row[query] && !asked_.row[key]) { continue; }
        const Real probability = factor_[query] * std::exp(score(query, key) - softmax.max[query]) / softmax.sum[query];
        const Real dropped = factor_of(draws, key);
        const Real of_score = static_cast<Real>(problem_.scale) * probability *
                              (dropped * dot(row(dout_, query), row(v_, key), head_dim) - softmax.delta[query]);
        add_scaled(operand(of_score), row(k_, key), head_dim, row(dq, query));
        add_scaled(operand(of_score), row(q_, query), head_dim, row(dk, key));
        add_scaled(operand(dropped * probability), row(dout_, query), head_dim, row(dv, key));
      }
    }
  }

  const Problem& problem_;
  const Pattern& pattern_;
  bool rounds_;
  const Asked& asked_;
  std::int64_t head_;
  int threads_;
  const HeadRows<Real>& q_;
  const HeadRows<Real>& k_;
  const HeadRows<Real>& v_;
  const HeadRows<Real>& dout_;
  List<Segment> segments_;
  List<bool> needed_;  ///< by token: whether its softmax is
  List<Softmax> softmaxes_;
  List<Real> factor_;  ///< by query: of O in the output
  double max_score_ = 0;
};

/// The checked heads of one tensor of one batch entry, by head.
List<HeadRows<float>> read_heads(const TensorSource& source, const Problem& problem, Tensor tensor, std::int64_t batch,
                                 std::int64_t first_head, std::int64_t heads) {
  List<HeadRows<float>> rows(heads);
  const std::int64_t head_dim = problem.head_dim;
  for (HeadRows<float>& of_head : rows) { of_head.resize(problem.seq_len * head_dim); }
  const std::int64_t all = heads_of(problem, tensor);
  const std::int64_t bytes = row_bytes(problem, tensor);
  const std::int64_t most = std::max<std::int64_t>(1, kReadBytes / bytes);
  List<std::byte> read(std::min(most, problem.seq_len) * bytes);
  for (std::int64_t first = 0; first < problem.seq_len; first += most) {
    const std::int64_t count = std::min(most, problem.seq_len - first);
    source.read(tensor, batch, first, count, problem.dtype, read.data());
    for (std::int64_t token = 0; token < count; ++token) {
      for (std::int64_t head = 0; head < heads; ++head) {
        const std::int64_t element = (token * all + first_head + head) * head_dim;
        widen(problem.dtype, read.data() + element * size_of(problem.dtype), head_dim, rows[head].data() + (first + token) * head_dim);
      }
    }
  }
  return rows;
}

double squares_of(const List<HeadRows<float>>& rows) {
  double sum = 0;
  for (const HeadRows<float>& of_head : rows) {
    for (const float value : of_head) { sum += static_cast<double>(value) * static_cast<double>(value); }
  }
  return sum;
}

class Gradients {
 public:
  Gradients(const TensorSource& source, const Problem& problem, const Pattern& pattern, std::span<const RowId> rows,
            const CheckedHeads& kv_heads, PlainProbabilities probabilities, int threads, std::atomic<std::uint64_t>* progress)
      : source_(source),
        problem_(problem),
        pattern_(pattern),
        rows_(rows.begin(), rows.end()),
        kv_heads_(kv_heads),
        probabilities_(probabilities),
        threads_(threads),
        progress_(progress) {
    if (pattern_.branches.empty()) { pattern_.branches = {{problem_.seq_len, 1}}; }
  }

  GradientRows compute() {
    make_room(result_.dq, problem_.heads);
    make_room(result_.dk, problem_.kv_heads);
    make_room(result_.dv, problem_.kv_heads);
    for (std::int64_t batch = 0; batch < problem_.batch; ++batch) {
      Asked asked;
      asked.batch = batch;
      asked.row.assign(problem_.seq_len, false);
      for (std::int64_t place = 0; place < std::ssize(rows_); ++place) {
        if (rows_[place].batch != batch) { continue; }
        asked.places.push_back(place);
        asked.row[rows_[place].row] = true;
      }
      if (!asked.places.empty()) { add_entry(asked); }
    }
    return std::move(result_);
  }

 private:
  void make_room(GradientOfRows& gradient, std::int64_t heads) const {
    gradient.exact.assign(std::ssize(rows_) * heads * problem_.head_dim, 0.0);
    gradient.plain.assign(gradient.exact.size(), 0.0F);
  }

  void add_entry(const Asked& asked) {
    const std::int64_t group = problem_.group_size();
    const std::int64_t heads = kv_heads_.count * group;
    const auto read = [&](Tensor tensor) {
      const bool of_keys = tensor == Tensor::k || tensor == Tensor::v;
      return read_heads(source_, problem_, tensor, asked.batch, of_keys ? kv_heads_.first : kv_heads_.first * group,
                        of_keys ? kv_heads_.count : heads);
    };
    const List<HeadRows<float>> q = read(Tensor::q);
    const List<HeadRows<float>> k = read(Tensor::k);
    const List<HeadRows<float>> v = read(Tensor::v);
    const List<HeadRows<float>> dout = read(Tensor::dout);
    result_.query_squares += squares_of(q);
    result_.key_squares += squares_of(k);
    result_.value_squares += squares_of(v);
    result_.dout_squares += squares_of(dout);
    result_.query_count += heads * problem_.seq_len * problem_.head_dim;
    result_.key_count += kv_heads_.count * problem_.seq_len * problem_.head_dim;
    List<double> max_scores(kv_heads_.count, 0.0);
    threads_of_head_ = std::max(1, threads_ / static_cast<int>(std::max<std::int64_t>(1, kv_heads_.count)));
    for_each_parallel(kv_heads_.count, threads_, [&](std::int64_t /*worker*/, std::int64_t kv_head) {
      const std::span<const HeadRows<float>> queries = std::span(q).subspan(static_cast<std::size_t>(kv_head * group), group_of());
      const std::span<const HeadRows<float>> douts = std::span(dout).subspan(static_cast<std::size_t>(kv_head * group), group_of());
      run_kv_head<float>(asked, kv_head, queries, k[kv_head], v[kv_head], douts);
      max_scores[kv_head] = run_kv_head<double>(asked, kv_head, queries, k[kv_head], v[kv_head], douts);
    });
    for (const double score : max_scores) { result_.max_score = std::max(result_.max_score, score); }
  }

  std::size_t group_of() const { return static_cast<std::size_t>(problem_.group_size()); }

  /// All query heads of one KV head, in their order. Returns the largest score met.
  template <class Real>
  double run_kv_head(const Asked& asked, std::int64_t kv_head, std::span<const HeadRows<float>> queries, const HeadRows<float>& keys,
                     const HeadRows<float>& values, std::span<const HeadRows<float>> douts) {
    const std::int64_t elements = problem_.seq_len * problem_.head_dim;
    const HeadRows<Real> k(keys.begin(), keys.end());
    const HeadRows<Real> v(values.begin(), values.end());
    HeadRows<Real> dk(elements, Real{0});
    HeadRows<Real> dv(elements, Real{0});
    double max_score = 0;
    for (std::size_t i = 0; i < queries.size(); ++i) {
      const std::int64_t head = (kv_heads_.first + kv_head) * problem_.group_size() + static_cast<std::int64_t>(i);
      const HeadRows<Real> q(queries[i].begin(), queries[i].end());
      const HeadRows<Real> dout(douts[i].begin(), douts[i].end());
      HeadRows<Real> dq(elements, Real{0});
      HeadGradients<Real> gradients(problem_, pattern_, probabilities_, asked, head, threads_of_head_, q, k, v, dout);
      gradients.add(dq, dk, dv);
      max_score = std::max(max_score, gradients.max_score());
      keep(asked, dq, problem_.heads, head, result_.dq);
      if (progress_ != nullptr) { progress_->fetch_add(1, std::memory_order_relaxed); }
    }
    keep(asked, dk, problem_.kv_heads, kv_heads_.first + kv_head, result_.dk);
    keep(asked, dv, problem_.kv_heads, kv_heads_.first + kv_head, result_.dv);
    return max_score;
  }

  void keep(const Asked& asked, const HeadRows<double>& from, std::int64_t heads, std::int64_t head, GradientOfRows& to) const {
    for_each_element(asked, heads, head, [&](std::int64_t element, std::int64_t place) { to.exact[place] = from[element]; });
  }
  void keep(const Asked& asked, const HeadRows<float>& from, std::int64_t heads, std::int64_t head, GradientOfRows& to) const {
    for_each_element(asked, heads, head,
                     [&](std::int64_t element, std::int64_t place) { to.plain[place] = round_to(problem_.dtype, from[element]); });
  }
  template <class Visit>
  void for_each_element(const Asked& asked, std::int64_t heads, std::int64_t head, const Visit& visit) const {
    for (const std::int64_t place : asked.places) {
      for (std::int64_t d = 0; d < problem_.head_dim; ++d) {
        visit(rows_[place].row * problem_.head_dim + d, (place * heads + head) * problem_.head_dim + d);
      }
    }
  }

  const TensorSource& source_;
  Problem problem_;
  Pattern pattern_;
  List<RowId> rows_;
  CheckedHeads kv_heads_;
  PlainProbabilities probabilities_;
  int threads_;
  int threads_of_head_ = 1;  ///< where there are more threads than heads to check
  std::atomic<std::uint64_t>* progress_;
  GradientRows result_;
};

}  // namespace

GradientRows oracle_gradients(const TensorSource& source, const Problem& problem, const Pattern& pattern, std::span<const RowId> rows,
                              const CheckedHeads& kv_heads, PlainProbabilities probabilities, int threads,
                              std::atomic<std::uint64_t>* progress) {
  validate(problem);
  if (!pattern.branches.empty()) { validate(pattern); }
  const Problem& held = source.problem();
  ANNULUS_EXPECTS(held.batch == problem.batch && held.seq_len == problem.seq_len && held.heads == problem.heads &&
                      held.kv_heads == problem.kv_heads && held.head_dim == problem.head_dim,
                  "{} holds another problem than the one to check", source.describe());
  ANNULUS_EXPECTS(problem.extra_keys == 0, "gradients of extra keys are not differentiated");
  ANNULUS_EXPECTS(source.has_dout(), "{} has no gradient of O", source.describe());
  ANNULUS_EXPECTS(kv_heads.first >= 0 && kv_heads.count >= 0 && kv_heads.count <= problem.kv_heads - kv_heads.first,
                  "KV heads {}..{} are outside 0..{}", kv_heads.first, kv_heads.first + kv_heads.count, problem.kv_heads);
  ANNULUS_EXPECTS(threads >= 1, "the oracle was given {} threads; it needs at least 1", threads);
  for (const RowId& id : rows) {
    ANNULUS_EXPECTS(id.batch >= 0 && id.batch < problem.batch && id.row >= 0 && id.row < problem.seq_len,
                    "row {} of batch {} lies outside batch {} x seq_len {}", id.row, id.batch, problem.batch, problem.seq_len);
  }
  if (pattern.order == SequenceOrder::linear) {
    return Gradients(source, problem, pattern, rows, kv_heads, probabilities, threads, progress).compute();
  }
  ANNULUS_EXPECTS(!problem.causal, "a causal mask has no meaning in the order {}", to_string(pattern.order));
  const List<std::int64_t> positions(position_table(pattern.order, problem.seq_len));
  List<RowId> permuted(rows.begin(), rows.end());
  for (RowId& id : permuted) { id.row = positions[id.row]; }
  const InOrder in_order(source, pattern.order);
  return Gradients(in_order, problem, pattern, permuted, kv_heads, probabilities, threads, progress).compute();
}

}  // namespace annulus
