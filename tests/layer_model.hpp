// SPDX-License-Identifier: Apache-2.0
// A multihead layer by its definition, token by token and head by head: in fp64 what is true, in fp32 with roundings to a dtype what a
// plain layer of that precision computes. Dense attention only; nothing here is shared with the library but the conversions of numbers.
#pragma once

#include <annulus/io/layer_source.hpp>
#include <annulus/kernels/dtype.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <vector>

namespace annulus::test {

inline float rounded_to(DType dtype, double value) {
  return kernels::with_element(dtype,
                               [&](auto tag) { return kernels::to_float(kernels::from_float<decltype(tag)>(static_cast<float>(value))); });
}

template <class Real>
class LayerModel {
 public:
  using Row = std::vector<Real>;

  /// Reads everything; `round` after each tensor that a layer of the dtype keeps.
  LayerModel(const LayerSource& source, const Layer& layer, const Problem& problem, bool round)
      : source_(source), layer_(layer), problem_(problem), round_(round) {
    for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
      q_.push_back(
          projected(batch, Activation::x, Weight::wq, Weight::bq, Weight::q_norm_weight, Weight::q_norm_bias, problem.heads, true));
      k_.push_back(
          projected(batch, Activation::x_key, Weight::wk, Weight::bk, Weight::k_norm_weight, Weight::k_norm_bias, problem.kv_heads, true));
      v_.push_back(projected(batch, Activation::x_value, Weight::wv, Weight::bv, Weight::wv, Weight::wv, problem.kv_heads, false));
      append(k_.back(), Weight::bias_k);
      append(v_.back(), Weight::bias_v);
    }
  }

  /// y of one token.
  Row row(std::int64_t batch, std::int64_t token) const {
    const std::int64_t dim = problem_.head_dim;
    Row o;
    for (std::int64_t head = 0; head < problem_.heads; ++head) {
      const std::int64_t kv_head = head / (problem_.heads / problem_.kv_heads);
      std::int64_t visible = problem_.causal ? token + 1 : problem_.seq_len;
      if (!problem_.kv_lengths.empty()) { visible = std::min(visible, problem_.kv_lengths[static_cast<std::size_t>(batch)]); }
      std::vector<std::int64_t> keys;
      for (std::int64_t key = 0; key < visible; ++key) { keys.push_back(key); }
      // What was appended, whatever hides the others.
      for (std::size_t key = static_cast<std::size_t>(problem_.seq_len); key < k_[static_cast<std::size_t>(batch)].size(); ++key) {
        keys.push_back(static_cast<std::int64_t>(key));
      }
      std::vector<Real> weights;
      for (const std::int64_t key : keys) {
        Real score = 0;
        for (std::int64_t d = 0; d < dim; ++d) { score += at(q_, batch, token, head * dim + d) * at(k_, batch, key, kv_head * dim + d); }
        weights.push_back(score * static_cast<Real>(problem_.scale));
      }
      const Real largest = *std::max_element(weights.begin(), weights.end());
      Real sum = 0;
      for (Real& weight : weights) { sum += weight = std::exp(weight - largest); }
      for (std::int64_t d = 0; d < dim; ++d) {
        Real value = 0;
        for (std::size_t i = 0; i < keys.size(); ++i) { value += weights[i] * at(v_, batch, keys[i], kv_head * dim + d); }
        o.push_back(keep(value / sum));
      }
    }
    normalise(o, layer_.output_norm, Weight::o_norm_weight, Weight::o_norm_bias);
    if (layer_.gate != Gate::none) {
      const Row gate = product(inputs(batch, Activation::x, token), Weight::wg, Weight::bg);
      for (std::size_t i = 0; i < o.size(); ++i) {
        const Real z = gate[i] / static_cast<Real>(layer_.gate_temperature);
        Real open = 0;
        if (layer_.gate == Gate::sigmoid) { open = 1 / (1 + std::exp(-z)); }
        if (layer_.gate == Gate::tanh) { open = std::tanh(z); }
        if (layer_.gate == Gate::relu) { open = z > 0 ? z : 0; }
        if (layer_.gate == Gate::gelu) { open = z / 2 * (1 + std::erf(z / std::sqrt(Real{2}))); }
        o[i] *= open;
      }
    }
    for (Real& value : o) { value = keep(value); }
    Row y = product(o, Weight::wo, Weight::bo);
    for (Real& value : y) { value = keep(value); }
    return y;
  }

 private:
  using Rows = std::vector<Row>;

  Real keep(Real value) const { return round_ ? static_cast<Real>(rounded_to(problem_.dtype, static_cast<double>(value))) : value; }
  static Real at(const std::vector<Rows>& rows, std::int64_t batch, std::int64_t token, std::int64_t element) {
    return rows[static_cast<std::size_t>(batch)][static_cast<std::size_t>(token)][static_cast<std::size_t>(element)];
  }

  /// The dtype's values of a row of x or of what stands for it.
  Row inputs(std::int64_t batch, Activation which, std::int64_t token) const {
    const Activation found = source_.has(which) ? which : Activation::x;
    std::vector<float> values(static_cast<std::size_t>(features_of(layer_, found)));
    source_.read(found, batch, token, 1, DType::fp32, values.data());
    Row row;
    for (const float value : values) { row.push_back(static_cast<Real>(rounded_to(problem_.dtype, static_cast<double>(value)))); }
    return row;
  }

  /// Empty where there are none.
  const std::vector<float>& weights(Weight which) const {
    const auto [found, inserted] = weights_.try_emplace(which);
    if (inserted && source_.has(which)) { found->second = source_.weights(which); }
    return found->second;
  }

  Row product(const Row& in, Weight weight, Weight bias) const {
    const std::vector<float>& matrix = weights(weight);
    const std::vector<float>& added = weights(bias);
    Row out;
    for (std::size_t i = 0; i < matrix.size() / in.size(); ++i) {
      Real sum = 0;
      for (std::size_t j = 0; j < in.size(); ++j) {
        sum += in[j] * static_cast<Real>(rounded_to(problem_.dtype, static_cast<double>(matrix[i * in.size() + j])));
      }
      out.push_back(added.empty() ? sum : sum + static_cast<Real>(added[i]));
    }
    return out;
  }

  void normalise(Row& row, Norm norm, Weight weight, Weight bias) const {
    if (norm == Norm::none) { return; }
    const std::vector<float> scale = source_.has(weight) ? weights(weight) : std::vector<float>(row.size(), 1.0F);
    const std::vector<float> shift = source_.has(bias) ? weights(bias) : std::vector<float>(scale.size(), 0.0F);
    for (std::size_t first = 0; first < row.size(); first += scale.size()) {
      Real mean = 0;
      for (std::size_t i = 0; i < scale.size() && norm == Norm::layer; ++i) { mean += row[first + i] / static_cast<Real>(scale.size()); }
      Real variance = static_cast<Real>(layer_.norm_epsilon);
      for (std::size_t i = 0; i < scale.size(); ++i) {
        variance += (row[first + i] - mean) * (row[first + i] - mean) / static_cast<Real>(scale.size());
      }
      for (std::size_t i = 0; i < scale.size(); ++i) {
        row[first + i] = (row[first + i] - mean) / std::sqrt(variance) * static_cast<Real>(scale[i]) + static_cast<Real>(shift[i]);
      }
    }
  }

  void append(Rows& rows, Weight weight) const {
    if (layer_.bias_kv) {
      rows.emplace_back();
      for (const float value : weights(weight)) { rows.back().push_back(keep(static_cast<Real>(value))); }
    }
    for (std::int64_t token = 0; token < layer_.zero_tokens; ++token) { rows.emplace_back(rows.front().size(), Real{0}); }
  }

  Rows projected(std::int64_t batch, Activation which, Weight weight, Weight bias, Weight norm_weight, Weight norm_bias, std::int64_t heads,
                 bool queries_or_keys) const {
    Rows rows;
    for (std::int64_t token = 0; token < problem_.seq_len; ++token) {
      Row& row = rows.emplace_back(product(inputs(batch, which, token), weight, bias));
      if (queries_or_keys) {
        normalise(row, layer_.qk_norm, norm_weight, norm_bias);
        for (std::int64_t head = 0; head < heads && layer_.rotary != RotaryPairs::none; ++head) {
          const auto dim = static_cast<std::size_t>(problem_.head_dim);
          const Row old(row.begin() + head * problem_.head_dim, row.begin() + (head + 1) * problem_.head_dim);
          for (std::size_t d = 0; d < dim; ++d) {
            const bool half = layer_.rotary == RotaryPairs::half;
            const std::size_t pair = half ? d % (dim / 2) : d / 2;
            const bool second = half ? d >= dim / 2 : d % 2 == 1;
            const std::size_t other = half ? (d + dim / 2) % dim : (second ? d - 1 : d + 1);
            const double angle =
                static_cast<double>(token) * std::pow(layer_.rotary_base, -2.0 * static_cast<double>(pair) / static_cast<double>(dim));
            row[static_cast<std::size_t>(head) * dim + d] =
                old[d] * static_cast<Real>(std::cos(angle)) + (second ? old[other] : -old[other]) * static_cast<Real>(std::sin(angle));
          }
        }
      }
      for (Real& value : row) { value = keep(value); }
    }
    return rows;
  }

  const LayerSource& source_;
  const Layer& layer_;
  const Problem& problem_;
  bool round_;
  std::vector<Rows> q_;
  std::vector<Rows> k_;
  std::vector<Rows> v_;
  mutable std::map<Weight, std::vector<float>> weights_;  ///< as they are asked for
};

}  // namespace annulus::test
