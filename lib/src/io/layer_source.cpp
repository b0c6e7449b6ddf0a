// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/layer_source.hpp>

#include <annulus/core/error.hpp>

namespace annulus {

std::int64_t features_of(const Layer& layer, Activation which) {
  switch (which) {
    case Activation::x_key:
      return layer.kdim;
    case Activation::x_value:
      return layer.vdim;
    case Activation::x:
      break;
  }
  return layer.embed;
}

std::int64_t LayerSource::elements(Weight which) const {
  std::int64_t count = has(which) ? 1 : 0;
  for (const std::int64_t extent : extents(which)) { count *= extent; }
  return count;
}

void require_weights(const LayerSource& source, const Layer& layer) {
  const auto forbid_unless = [&](bool wanted, Weight which, const std::string& option) {
    ANNULUS_EXPECTS(wanted || !source.has(which), "{} has {}, and --{}", source.describe(), to_string(which), option);
  };
  for (const Weight which : {Weight::q_norm_weight, Weight::q_norm_bias, Weight::k_norm_weight, Weight::k_norm_bias}) {
    forbid_unless(layer.qk_norm != Norm::none, which, "layer.qk-norm is none");
  }
  for (const Weight which : {Weight::q_norm_bias, Weight::k_norm_bias}) {
    forbid_unless(layer.qk_norm != Norm::rms, which, "layer.qk-norm rms has no bias");
  }
  for (const Weight which : {Weight::o_norm_weight, Weight::o_norm_bias}) {
    forbid_unless(layer.output_norm != Norm::none, which, "layer.output-norm is none");
  }
  forbid_unless(layer.output_norm != Norm::rms, Weight::o_norm_bias, "layer.output-norm rms has no bias");
  for (const Weight which : {Weight::wg, Weight::bg}) { forbid_unless(layer.gate != Gate::none, which, "layer.gate is none"); }
  ANNULUS_EXPECTS(layer.gate == Gate::none || source.has(Weight::wg), "--layer.gate {} needs /wg, and {} has none", to_string(layer.gate),
                  source.describe());
}

}  // namespace annulus
