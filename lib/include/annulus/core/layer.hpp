// SPDX-License-Identifier: Apache-2.0
// The multihead layer around attention: rows of /x are projected to Q, K and V, and what attention makes of them to rows of /y.
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/core/problem.hpp>
#include <annulus/kernels/layer.hpp>

#include <cstdint>

namespace annulus {

template <>
struct EnumNames<Norm> {
  static constexpr std::array<std::pair<Norm, std::string_view>, 3> values{
      {{Norm::none, "none"}, {Norm::layer, "layer"}, {Norm::rms, "rms"}}};
};
template <>
struct EnumNames<RotaryPairs> {
  static constexpr std::array<std::pair<RotaryPairs, std::string_view>, 3> values{
      {{RotaryPairs::none, "none"}, {RotaryPairs::neighbouring, "neighbouring"}, {RotaryPairs::half, "half"}}};
};
template <>
struct EnumNames<Gate> {
  static constexpr std::array<std::pair<Gate, std::string_view>, 5> values{
      {{Gate::none, "none"}, {Gate::sigmoid, "sigmoid"}, {Gate::tanh, "tanh"}, {Gate::relu, "relu"}, {Gate::gelu, "gelu"}}};
};

inline constexpr std::int64_t kMaxFeatures = std::int64_t{1} << 24;

/// y = W_o gate(norm(attention(q, k, v))) with q = rotary(norm(W_q x)), k = rotary(norm(W_k x_key)), v = W_v x_value, and a bias after each
/// product where there is one. Appended keys and values are behind those of x: every query sees them.
struct Layer {
  std::int64_t embed = 0;  ///< features of x and y; 0: heads * head_dim
  std::int64_t kdim = 0;   ///< features of x_key; 0: embed
  std::int64_t vdim = 0;   ///< features of x_value; 0: embed
  bool bias = false;
  Norm qk_norm = Norm::none;      ///< of q and of k, before the rotary embedding
  Norm output_norm = Norm::none;  ///< of the attention's output, before gate and W_o
  double norm_epsilon = 1e-5;
  RotaryPairs rotary = RotaryPairs::none;  ///< by the token's number in the sequence
  double rotary_base = 10000.0;
  Gate gate = Gate::none;  ///< function((W_g x + bias) / gate_temperature), element by element
  double gate_temperature = 1.0;
  bool bias_kv = false;          ///< append a key and a value that are weights, the same for all batch entries
  std::int64_t zero_tokens = 0;  ///< append so many keys of zeros, with values of zeros
  bool operator==(const Layer&) const = default;
};

/// Features of a row of Q, and of O: all its heads.
inline std::int64_t q_features(const Problem& problem) { return problem.heads * problem.head_dim; }
/// Features of a row of K, and of V.
inline std::int64_t kv_features(const Problem& problem) { return problem.kv_heads * problem.head_dim; }

/// Problem::extra_keys of a problem in the layer: what it appends, the weights first.
inline std::int64_t extra_keys_of(const Layer& layer) { return (layer.bias_kv ? 1 : 0) + layer.zero_tokens; }

/// Fills in the extents that are 0.
void complete_extents(Layer& layer, const Problem& problem);

/// That the layer, with all extents, can be around the attention of a valid problem.
/// @throws InvalidArgument naming the option, what was found and what is allowed
void validate(const Layer& layer, const Problem& problem, const Pattern& pattern);

}  // namespace annulus
