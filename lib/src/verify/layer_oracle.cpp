// SPDX-License-Identifier: Apache-2.0
#include <annulus/verify/layer_oracle.hpp>

#include <annulus/core/error.hpp>
#include <annulus/kernels/dtype.hpp>

#include "parallel.hpp"
#include "rounding.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace annulus {
namespace {

constexpr std::int64_t kRowsPerUnit = 8;  // rows that one thread takes at a time

/// A matrix as a product takes it, [in][out], and the bias after it.
struct Map {
  std::int64_t in = 0;
  std::int64_t out = 0;
  std::vector<float> weight;
  std::vector<float> bias;  ///< empty: none
};

/// What normalises a row or its heads.
struct Normalisation {
  Norm norm = Norm::none;
  std::int64_t count = 0;  ///< elements that go together
  double epsilon = 0;
  std::vector<float> weight;  ///< empty: 1
  std::vector<float> bias;    ///< empty: 0
};

/// All weights of a layer, and rows by its definition.
class Definition {
 public:
  Definition(const LayerSource& source, const Layer& layer, const Problem& problem)
      : layer_(layer),
        problem_(problem),
        q_(map(source, Weight::wq, Weight::bq)),
        k_(map(source, Weight::wk, Weight::bk)),
        v_(map(source, Weight::wv, Weight::bv)),
        o_(map(source, Weight::wo, Weight::bo)),
        q_norm_(normalisation(source, layer.qk_norm, Weight::q_norm_weight, Weight::q_norm_bias, problem.heads)),
        k_norm_(normalisation(source, layer.qk_norm, Weight::k_norm_weight, Weight::k_norm_bias, problem.kv_heads)),
        o_norm_(normalisation(source, layer.output_norm, Weight::o_norm_weight, Weight::o_norm_bias, problem.heads)) {
    if (layer.gate != Gate::none) { gate_ = map(source, Weight::wg, Weight::bg); }
    if (layer.bias_kv) {
      bias_k_ = source.weights(Weight::bias_k);
      bias_v_ = source.weights(Weight::bias_v);
    }
  }

  /// Row `number` of what is appended to K or V, before it is rounded: the weights, if there are any, and zeros after them.
  template <class Real>
  void append(Tensor tensor, std::int64_t number, Real* row) const {
    const std::vector<float>& weights = tensor == Tensor::k_extra ? bias_k_ : bias_v_;
    for (std::int64_t i = 0; i < problem_.kv_heads * problem_.head_dim; ++i) {
      row[i] = number == 0 && !weights.empty() ? static_cast<Real>(weights[static_cast<std::size_t>(i)]) : Real{0};
    }
  }

  /// The row of a tensor that is made of `x` at `token`, before it is rounded.
  template <class Real>
  void project(Tensor tensor, std::int64_t token, const float* x, Real* row) const {
    const Map& map = of(tensor);
    multiply(map, x, row);
    switch (tensor) {
      case Tensor::q:
        normalise(q_norm_, problem_.heads, row);
        turn(token, problem_.heads, row);
        break;
      case Tensor::k:
        normalise(k_norm_, problem_.kv_heads, row);
        turn(token, problem_.kv_heads, row);
        break;
      case Tensor::v:
      case Tensor::k_extra:
      case Tensor::v_extra:
      case Tensor::dout:  // is no product of a weight
        break;
    }
  }

  /// y of a row of O, before it is rounded; `x` is the token's. `round` is what becomes of the row between norm, gate and the product.
  template <class Real, class Round>
  void finish(const float* x, std::vector<Real> o, const Round& round, Real* y) const {
    normalise(o_norm_, problem_.heads, o.data());
    if (layer_.gate != Gate::none) {
      std::vector<Real> gate(o.size());
      multiply(gate_, x, gate.data());
      for (std::size_t i = 0; i < o.size(); ++i) { o[i] *= opened(gate[i] / static_cast<Real>(layer_.gate_temperature)); }
    }
    for (Real& value : o) { value = round(value); }
    multiply(o_, o.data(), y);
  }

 private:
  Map map(const LayerSource& source, Weight weight, Weight bias) const {
    Map map;
    const std::vector<std::int64_t> extents = source.extents(weight);
    map.out = extents[0];
    map.in = extents[1];
    const std::vector<float> stored = source.weights(weight);
    map.weight.resize(stored.size());
    for (std::int64_t row = 0; row < map.out; ++row) {
      for (std::int64_t column = 0; column < map.in; ++column) {
        map.weight[static_cast<std::size_t>(column * map.out + row)] =
            round_to(problem_.dtype, stored[static_cast<std::size_t>(row * map.in + column)]);
      }
    }
    if (source.has(bias)) { map.bias = source.weights(bias); }
    return map;
  }

  Normalisation normalisation(const LayerSource& source, Norm norm, Weight weight, Weight bias, std::int64_t heads) const {
    Normalisation made;
    made.norm = norm;
    made.epsilon = layer_.norm_epsilon;
    if (norm == Norm::none) { return made; }
    if (source.has(weight)) { made.weight = source.weights(weight); }
    if (source.has(bias)) { made.bias = source.weights(bias); }
    made.count = heads * problem_.head_dim;
    if (!made.weight.empty()) { made.count = static_cast<std::int64_t>(made.weight.size()); }
    if (!made.bias.empty()) { made.count = static_cast<std::int64_t>(made.bias.size()); }
    return made;
  }

  const Map& of(Tensor tensor) const {
    switch (tensor) {
      case Tensor::q:
        return q_;
      case Tensor::k:
        return k_;
      case Tensor::v:
      case Tensor::k_extra:
      case Tensor::v_extra:
      case Tensor::dout:  // is no product of a weight
        break;
    }
    return v_;
  }

  /// out = in W + bias, every sum from the first feature to the last.
  template <class In, class Real>
  static void multiply(const Map& map, const In* in, Real* out) {
    constexpr std::int64_t kLanes = 16;  // sums kept in registers
    for (std::int64_t first = 0; first < map.out; first += kLanes) {
      const std::int64_t lanes = std::min(kLanes, map.out - first);
      Real sums[kLanes] = {};
      for (std::int64_t i = 0; i < map.in; ++i) {
        const auto factor = static_cast<Real>(in[i]);
        const float* weight = map.weight.data() + i * map.out + first;
        if (lanes == kLanes) {
          for (std::int64_t lane = 0; lane < kLanes; ++lane) { sums[lane] += factor * static_cast<Real>(weight[lane]); }
        } else {
          for (std::int64_t lane = 0; lane < lanes; ++lane) { sums[lane] += factor * static_cast<Real>(weight[lane]); }
        }
      }
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        const auto at = static_cast<std::size_t>(first + lane);
        out[first + lane] = map.bias.empty() ? sums[lane] : sums[lane] + static_cast<Real>(map.bias[at]);
      }
    }
  }

  template <class Real>
  void normalise(const Normalisation& how, std::int64_t heads, Real* row) const {
    if (how.norm == Norm::none) { return; }
    for (std::int64_t first = 0; first < heads * problem_.head_dim; first += how.count) {
      Real sum = 0;
      for (std::int64_t i = 0; i < how.count; ++i) { sum += row[first + i]; }
      const Real mean = how.norm == Norm::layer ? sum / static_cast<Real>(how.count) : Real{0};
      Real squares = 0;
      for (std::int64_t i = 0; i < how.count; ++i) { squares += (row[first + i] - mean) * (row[first + i] - mean); }
      const Real deviation = std::sqrt(squares / static_cast<Real>(how.count) + static_cast<Real>(how.epsilon));
      for (std::int64_t i = 0; i < how.count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        Real value = (row[first + i] - mean) / deviation;
        if (!how.weight.empty()) { value *= static_cast<Real>(how.weight[at]); }
        if (!how.bias.empty()) { value += static_cast<Real>(how.bias[at]); }
        row[first + i] = value;
      }
    }
  }

  /// The rotary embedding of the token's number. Its angles are in fp64 for the plain run too: fp32 does not hold those of late tokens.
  template <class Real>
  void turn(std::int64_t token, std::int64_t heads, Real* row) const {
    if (layer_.rotary == RotaryPairs::none) { return; }
    const std::int64_t half = problem_.head_dim / 2;
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(token) / std::pow(layer_.rotary_base, static_cast<double>(i) / static_cast<double>(half));
      const auto c = static_cast<Real>(std::cos(angle));
      const auto s = static_cast<Real>(std::sin(angle));
      for (std::int64_t head = 0; head < heads; ++head) {
        Real* of_head = row + head * problem_.head_dim;
        Real* a = nullptr;
        Real* b = nullptr;
        switch (layer_.rotary) {
          case RotaryPairs::neighbouring:
            a = of_head + 2 * i;
            b = a + 1;
            break;
          case RotaryPairs::half:
          case RotaryPairs::none:
            a = of_head + i;
            b = a + half;
            break;
        }
        const std::pair<Real, Real> before{*a, *b};
        *a = before.first * c - before.second * s;
        *b = before.second * c + before.first * s;
      }
    }
  }

  template <class Real>
  Real opened(Real z) const {
    switch (layer_.gate) {
      case Gate::sigmoid:
        return 1 / (1 + std::exp(-z));
      case Gate::tanh:
        return std::tanh(z);
      case Gate::relu:
        return std::max(z, Real{0});
      case Gate::gelu:
        return z * (1 + std::erf(z / static_cast<Real>(std::numbers::sqrt2))) / 2;
      case Gate::none:
        break;
    }
    return 1;
  }

  const Layer& layer_;
  const Problem& problem_;
  Map q_;
  Map k_;
  Map v_;
  Map o_;
  Map gate_;
  Normalisation q_norm_;
  Normalisation k_norm_;
  Normalisation o_norm_;
  std::vector<float> bias_k_;  ///< appended; empty: none
  std::vector<float> bias_v_;
};

/// Reads rows of x and its like, and hands them out one by one to all threads.
class Rows {
 public:
  Rows(const LayerSource& source, const Layer& layer, DType dtype, int threads, std::atomic<std::uint64_t>* progress)
      : source_(source), layer_(layer), dtype_(dtype), threads_(threads), progress_(progress) {}

  /// Calls body(row, x) for rows [first, first + count) of one batch entry; x holds values of the dtype.
  template <class Body>
  void for_each(Activation which, std::int64_t batch, std::int64_t first, std::int64_t count, const Body& body) const {
    const Activation found = source_.has(which) ? which : Activation::x;
    const std::int64_t features = features_of(layer_, found);
    constexpr std::int64_t kRowsAtOnce = 1024;
    for (std::int64_t done = 0, part = 0; done < count; done += part) {
      part = std::min(kRowsAtOnce, count - done);
      std::vector<std::byte> stored(static_cast<std::size_t>(part * features * size_of(dtype_)));
      source_.read(found, batch, first + done, part, dtype_, stored.data());
      std::vector<float> values(static_cast<std::size_t>(part * features));
      kernels::with_element(dtype_, [&](auto tag) {
        const auto* elements = reinterpret_cast<const decltype(tag)*>(stored.data());
        for (std::size_t i = 0; i < values.size(); ++i) { values[i] = kernels::to_float(elements[i]); }
      });
      const std::int64_t units = (part + kRowsPerUnit - 1) / kRowsPerUnit;
      for_each_parallel(units, threads_, [&](std::int64_t /*worker*/, std::int64_t unit) {
        for (std::int64_t row = unit * kRowsPerUnit; row < std::min(part, (unit + 1) * kRowsPerUnit); ++row) {
          body(first + done + row, values.data() + row * features);
        }
        if (progress_ != nullptr) { progress_->fetch_add(1, std::memory_order_relaxed); }
      });
    }
  }

 private:
  const LayerSource& source_;
  const Layer& layer_;
  DType dtype_;
  int threads_;
  std::atomic<std::uint64_t>* progress_;
};

bool is_appended(Tensor tensor) { return tensor == Tensor::k_extra || tensor == Tensor::v_extra; }

Activation activation_of(Tensor tensor) {
  switch (tensor) {
    case Tensor::q:
      return Activation::x;
    case Tensor::k:
      return Activation::x_key;
    case Tensor::v:
    case Tensor::k_extra:
    case Tensor::v_extra:
    case Tensor::dout:  // is no product of a weight
      break;
  }
  return Activation::x_value;
}

/// Q, K and V of the plain run.
class PlainProjection final : public TensorSource {
 public:
  PlainProjection(const Definition& definition, const Rows& rows, const Problem& problem, const LayerSource& source)
      : definition_(definition), rows_(rows), problem_(problem), source_(source) {}
  const Problem& problem() const override { return problem_; }
  std::string describe() const override { return source_.describe(); }
  std::string identity() const override { return source_.identity(); }
  std::uint64_t fingerprint(Tensor /*tensor*/, std::int64_t /*part*/, std::int64_t /*parts*/) const override {
    ANNULUS_ASSERT(false, "projections of {} are not compared", describe());
  }
  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    const std::int64_t features = heads_of(problem_, tensor) * problem_.head_dim;
    const auto store = [&](std::int64_t row, const std::vector<float>& values) {
      kernels::with_element(dtype, [&](auto tag) {
        using Element = decltype(tag);
        auto* to = static_cast<Element*>(out) + (row - first) * features;
        for (std::int64_t i = 0; i < features; ++i) { to[i] = kernels::from_float<Element>(values[static_cast<std::size_t>(i)]); }
      });
    };
    if (is_appended(tensor)) {
      std::vector<float> appended(static_cast<std::size_t>(features));
      for (std::int64_t row = first; row < first + count; ++row) {
        definition_.append(tensor, row, appended.data());
        store(row, appended);
      }
      return;
    }
    rows_.for_each(activation_of(tensor), batch, first, count, [&](std::int64_t row, const float* x) {
      std::vector<float> projected(static_cast<std::size_t>(features));
      definition_.project(tensor, row, x, projected.data());
      store(row, projected);
    });
  }

 private:
  const Definition& definition_;
  const Rows& rows_;
  const Problem& problem_;
  const LayerSource& source_;
};

/// Those of the exact run.
class ExactProjection final : public ExactRows {
 public:
  ExactProjection(const Definition& definition, const Rows& rows, const Problem& problem)
      : definition_(definition), rows_(rows), problem_(problem) {}
  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, double* out) const override {
    const std::int64_t features = heads_of(problem_, tensor) * problem_.head_dim;
    if (is_appended(tensor)) {
      for (std::int64_t row = 0; row < count; ++row) { definition_.append(tensor, first + row, out + row * features); }
      return;
    }
    rows_.for_each(activation_of(tensor), batch, first, count,
                   [&](std::int64_t row, const float* x) { definition_.project(tensor, row, x, out + (row - first) * features); });
  }

 private:
  const Definition& definition_;
  const Rows& rows_;
  const Problem& problem_;
};

/// Rows of y as the comparison of O takes rows: of one head.
Problem output_problem(const Layer& layer, DType dtype) {
  Problem problem;
  problem.heads = problem.kv_heads = 1;
  problem.head_dim = layer.embed;
  problem.dtype = dtype;
  return problem;
}

}  // namespace

LayerOracleRows layer_oracle_rows(const LayerSource& source, const Layer& layer, const Problem& problem, const Pattern& pattern,
                                  std::span<const RowId> rows, PlainProbabilities probabilities, int threads,
                                  std::atomic<std::uint64_t>* progress) {
  const Definition definition(source, layer, problem);
  const Rows inputs(source, layer, problem.dtype, threads, progress);
  const PlainProjection plain(definition, inputs, problem, source);
  const ExactProjection exact(definition, inputs, problem);
  LayerOracleRows result;
  result.attention = oracle_rows(plain, problem, pattern, rows, {0, problem.heads}, probabilities, threads, progress, &exact);

  OracleRows& y = result.output;
  const std::size_t elements = rows.size() * static_cast<std::size_t>(layer.embed);
  y.out.resize(elements);
  y.plain_out.resize(elements);
  y.scaled_out.assign(result.attention.scaled_out.size(), y.plain_out);
  y.lse.assign(rows.size(), 0.0);
  y.max_score.assign(rows.size(), 0.0);
  const auto features = static_cast<std::size_t>(q_features(problem));
  const auto round = [&](float value) { return round_to(problem.dtype, value); };
  const auto plainly = [&](const std::vector<float>& o, std::size_t index, const float* x, std::vector<float>& out) {
    const auto begin = o.begin() + static_cast<std::ptrdiff_t>(index * features);
    float* row = out.data() + index * static_cast<std::size_t>(layer.embed);
    definition.finish(x, std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(features)), round, row);
    for (std::int64_t i = 0; i < layer.embed; ++i) { row[i] = round(row[i]); }
  };
  for (std::size_t index = 0; index < rows.size(); ++index) {
    inputs.for_each(Activation::x, rows[index].batch, rows[index].row, 1, [&](std::int64_t /*row*/, const float* x) {
      const auto begin = result.attention.out.begin() + static_cast<std::ptrdiff_t>(index * features);
      definition.finish(
          x, std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(features)), [](double value) { return value; },
          y.out.data() + index * static_cast<std::size_t>(layer.embed));
      plainly(result.attention.plain_out, index, x, y.plain_out);
      for (std::size_t scale = 0; scale < y.scaled_out.size(); ++scale) {
        plainly(result.attention.scaled_out[scale], index, x, y.scaled_out[scale]);
      }
    });
  }
  return result;
}

ErrorSums compare_layer_rows(const Layer& layer, const Problem& problem, std::span<const RowId> rows, const void* y, const float* lse,
                             const LayerOracleRows& oracle) {
  const std::vector<float> no_lse(rows.size(), 0.0F);
  ErrorSums sums = compare_rows(output_problem(layer, problem.dtype), rows, y, no_lse.data(), oracle.output);
  add_lse(problem, rows, {0, problem.heads}, lse, oracle.attention, sums);
  return sums;
}

void require_all_compared(const Layer& layer, std::int64_t rows, const ErrorSums& sums) {
  require_all_compared(output_problem(layer, DType::fp32), rows, sums);
}

}  // namespace annulus
