// SPDX-License-Identifier: Apache-2.0
// Where the rows and the weights of a multihead layer come from.
#pragma once

#include <annulus/core/layer.hpp>
#include <annulus/io/source.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace annulus {

/// What a layer projects, by dataset: q and the gate come from x, k from x_key and v from x_value, which are x where they are absent.
enum class Activation { x, x_key, x_value };

/// What it projects with, by dataset. Rows of a matrix are output features, as PyTorch stores them.
enum class Weight {
  wq,             ///< [heads * head_dim, embed]
  wk,             ///< [kv_heads * head_dim, kdim]
  wv,             ///< [kv_heads * head_dim, vdim]
  wo,             ///< [embed, heads * head_dim]
  wg,             ///< [heads * head_dim, embed]
  bq,             ///< [heads * head_dim]
  bk,             ///< [kv_heads * head_dim]
  bv,             ///< [kv_heads * head_dim]
  bo,             ///< [embed]
  bg,             ///< [heads * head_dim]
  q_norm_weight,  ///< [heads * head_dim]; or [head_dim], and each head is normalised by itself
  q_norm_bias,
  k_norm_weight,  ///< [kv_heads * head_dim] or [head_dim]
  k_norm_bias,
  o_norm_weight,  ///< [heads * head_dim] or [head_dim]
  o_norm_bias,
  bias_k,  ///< [kv_heads * head_dim]: the appended key
  bias_v,  ///< [kv_heads * head_dim]: its value
};

template <>
struct EnumNames<Activation> {
  static constexpr std::array<std::pair<Activation, std::string_view>, 3> values{
      {{Activation::x, "/x"}, {Activation::x_key, "/x_key"}, {Activation::x_value, "/x_value"}}};
};
template <>
struct EnumNames<Weight> {
  static constexpr std::array<std::pair<Weight, std::string_view>, 18> values{{{Weight::wq, "/wq"},
                                                                               {Weight::wk, "/wk"},
                                                                               {Weight::wv, "/wv"},
                                                                               {Weight::wo, "/wo"},
                                                                               {Weight::wg, "/wg"},
                                                                               {Weight::bq, "/bq"},
                                                                               {Weight::bk, "/bk"},
                                                                               {Weight::bv, "/bv"},
                                                                               {Weight::bo, "/bo"},
                                                                               {Weight::bg, "/bg"},
                                                                               {Weight::q_norm_weight, "/q_norm_weight"},
                                                                               {Weight::q_norm_bias, "/q_norm_bias"},
                                                                               {Weight::k_norm_weight, "/k_norm_weight"},
                                                                               {Weight::k_norm_bias, "/k_norm_bias"},
                                                                               {Weight::o_norm_weight, "/o_norm_weight"},
                                                                               {Weight::o_norm_bias, "/o_norm_bias"},
                                                                               {Weight::bias_k, "/bias_k"},
                                                                               {Weight::bias_v, "/bias_v"}}};
};

/// Rows and weights of a layer: a file's or generated. Any rank may read any rows; const calls are independent of each other.
class LayerSource : public InputSource {
 public:
  /// Extents and dtype of x and of the attention inside; as TensorSource::problem().
  virtual const Problem& problem() const = 0;
  /// Its extents, whether there is any bias and an appended key, and what a file says of the rotary embedding. All else has its default.
  virtual const Layer& layer() const = 0;

  virtual bool has(Activation which) const = 0;
  /// Rows [first, first+count) of one batch entry into `out` [count, features], converted to `dtype` once (16-bit: to nearest even).
  /// @throws InvalidArgument naming dataset and first index if a value is NaN or infinite, RuntimeFailure if the disk fails
  virtual void read(Activation which, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const = 0;

  /// [out features, in features], or [features]; none where there is no such weight.
  virtual std::vector<std::int64_t> extents(Weight which) const = 0;
  bool has(Weight which) const { return !extents(which).empty(); }
  /// How many values it has; 0 where there is none.
  std::int64_t elements(Weight which) const;
  /// All values as they are stored, in fp32. @throws as read()
  virtual std::vector<float> weights(Weight which) const = 0;
};

/// Features of a row.
std::int64_t features_of(const Layer& layer, Activation which);

/// That the weights are those that the layer takes: a matrix for each product, and no norm or gate of which the layer knows nothing.
/// @throws InvalidArgument naming dataset and option
void require_weights(const LayerSource& source, const Layer& layer);

/// An HDF5 file with /x [batch, seq, embed] (or 2-D, batch 1) and the datasets of Weight; /x_key, /x_value and all but /wq, /wk, /wv and
/// /wo may be absent. fp32, fp16 or bf16, x and its like of one dtype. Attributes of the root: heads (int, unless `heads` says it), scale,
/// rope_pairs (a name of RotaryPairs) and rope_base. It may hold /kv_lengths [batch].
/// @throws InvalidArgument as open_input()
std::unique_ptr<LayerSource> open_layer_input(const std::string& path, std::optional<std::int64_t> heads);

/// Standard normal x, and weights that keep its variance: matrices normal / sqrt(in features), biases and norm biases normal / 4, norm
/// weights 1 + normal / 4, of whole rows. They depend on (seed, dataset, element) alone. @throws InvalidArgument as validate()
std::unique_ptr<LayerSource> make_layer_generator(const Problem& problem, const Layer& layer, std::uint64_t seed, int threads = 1);

}  // namespace annulus
