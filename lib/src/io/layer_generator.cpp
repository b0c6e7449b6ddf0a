// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/io/layer_source.hpp>

#include <cmath>
#include <utility>
#include <vector>

namespace annulus {

namespace {

class LayerGenerator final : public LayerSource {
 public:
  LayerGenerator(const Problem& problem, const Layer& layer, std::uint64_t seed, int threads)
      : problem_(problem), layer_(layer), seed_(seed), threads_(threads) {
    complete_extents(layer_, problem_);
    validate(problem_);
    validate(layer_, problem_, Pattern{});
    problem_.causal = false;
    problem_.scale = 1.0 / std::sqrt(static_cast<double>(problem_.head_dim));
  }

  const Problem& problem() const override { return problem_; }
  const Layer& layer() const override { return layer_; }
  std::string describe() const override { return fmt::format("generator, seed {}", seed_); }
  std::string identity() const override { return describe(); }
  std::vector<Fingerprint> fingerprints(std::int64_t part, std::int64_t /*parts*/) const override {
    return {{"the seed", part == 0 ? seed_ : 0}};
  }

  bool has(Activation which) const override {
    switch (which) {
      case Activation::x:
        return true;
      case Activation::x_key:
        return layer_.kdim != layer_.embed;
      case Activation::x_value:
        break;
    }
    return layer_.vdim != layer_.embed;
  }

  void read(Activation which, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    ANNULUS_EXPECTS(batch >= 0 && batch < problem_.batch && first >= 0 && count >= 0 && count <= problem_.seq_len - first,
                    "rows {}..{} of batch entry {} are outside the problem of the {}", first, first + count, batch, describe());
    const std::int64_t features = features_of(layer_, which);
    const std::int64_t rows = problem_.batch * problem_.seq_len;
    values(static_cast<std::uint64_t>(which), rows * features)
        ->read(Tensor::q, 0, (batch * problem_.seq_len + first) * features, count * features, dtype, out);
  }

  std::vector<std::int64_t> extents(Weight which) const override {
    const std::int64_t q = q_features(problem_);
    const std::int64_t kv = kv_features(problem_);
    const auto if_any = [](bool any, std::vector<std::int64_t> extents) { return any ? std::move(extents) : std::vector<std::int64_t>(); };
    switch (which) {
      case Weight::wq:
        return {q, layer_.embed};
      case Weight::wk:
        return {kv, layer_.kdim};
      case Weight::wv:
        return {kv, layer_.vdim};
      case Weight::wo:
        return {layer_.embed, q};
      case Weight::wg:
        return if_any(layer_.gate != Gate::none, {q, layer_.embed});
      case Weight::bq:
        return if_any(layer_.bias, {q});
      case Weight::bk:
      case Weight::bv:
        return if_any(layer_.bias, {kv});
      case Weight::bo:
        return if_any(layer_.bias, {layer_.embed});
      case Weight::bg:
        return if_any(layer_.bias && layer_.gate != Gate::none, {q});
      case Weight::q_norm_weight:
        return if_any(layer_.qk_norm != Norm::none, {q});
      case Weight::q_norm_bias:
        return if_any(layer_.qk_norm == Norm::layer, {q});
      case Weight::k_norm_weight:
        return if_any(layer_.qk_norm != Norm::none, {kv});
      case Weight::k_norm_bias:
        return if_any(layer_.qk_norm == Norm::layer, {kv});
      case Weight::o_norm_weight:
        return if_any(layer_.output_norm != Norm::none, {q});
      case Weight::o_norm_bias:
        return if_any(layer_.output_norm == Norm::layer, {q});
      case Weight::bias_k:
      case Weight::bias_v:
        break;
    }
    return if_any(layer_.bias_kv, {kv});
  }

  std::vector<float> weights(Weight which) const override {
    const std::vector<std::int64_t> shape = extents(which);
    const std::int64_t count = elements(which);
    std::vector<float> drawn(static_cast<std::size_t>(count));
    constexpr std::uint64_t kAfterActivations = 16;
    values(kAfterActivations + static_cast<std::uint64_t>(which), count)->read(Tensor::q, 0, 0, count, DType::fp32, drawn.data());
    const bool norm_weight = which == Weight::q_norm_weight || which == Weight::k_norm_weight || which == Weight::o_norm_weight;
    const float scale = shape.size() == 2 ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape[1]))) : 0.25F;
    for (float& value : drawn) { value = value * scale + (norm_weight ? 1.0F : 0.0F); }
    return drawn;
  }

 private:
  /// `count` standard normal values, as many rows of one element: a stream for each dataset.
  std::unique_ptr<TensorSource> values(std::uint64_t stream, std::int64_t count) const {
    Problem flat;
    flat.seq_len = count;
    flat.heads = flat.kv_heads = flat.head_dim = 1;
    flat.dtype = problem_.dtype;
    // Seeds of neighbouring runs are neighbours: streams must lie far from them. The constant is 2^64 over the golden ratio.
    return make_generator(flat, seed_ + (stream + 1) * 0x9e3779b97f4a7c15U, threads_);
  }

  Problem problem_;
  Layer layer_;
  std::uint64_t seed_;
  int threads_;
};

}  // namespace

std::unique_ptr<LayerSource> make_layer_generator(const Problem& problem, const Layer& layer, std::uint64_t seed, int threads) {
  return std::make_unique<LayerGenerator>(problem, layer, seed, threads);
}

}  // namespace annulus
