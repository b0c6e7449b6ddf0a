// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/layer.hpp>

#include <annulus/core/error.hpp>

#include <cmath>
#include <utility>

namespace annulus {

void complete_extents(Layer& layer, const Problem& problem) {
  if (layer.embed == 0) { layer.embed = q_features(problem); }
  if (layer.kdim == 0) { layer.kdim = layer.embed; }
  if (layer.vdim == 0) { layer.vdim = layer.embed; }
}

void validate(const Layer& layer, const Problem& problem, const Pattern& pattern) {
  for (const auto& [name, features] : {std::pair{"layer.embed", layer.embed}, {"layer.kdim", layer.kdim}, {"layer.vdim", layer.vdim}}) {
    ANNULUS_EXPECTS(features >= 1 && features <= kMaxFeatures, "{} {} is outside 1..{}", name, features, kMaxFeatures);
  }
  ANNULUS_EXPECTS(problem.heads <= kMaxFeatures / problem.head_dim, "heads {} of head-dim {} have more than {} features", problem.heads,
                  problem.head_dim, kMaxFeatures);
  ANNULUS_EXPECTS(std::isfinite(layer.norm_epsilon) && layer.norm_epsilon >= 0, "layer.norm-epsilon {} is negative", layer.norm_epsilon);
  ANNULUS_EXPECTS(std::isfinite(layer.rotary_base) && layer.rotary_base > 0, "layer.rotary-base {} is not positive", layer.rotary_base);
  ANNULUS_EXPECTS(layer.rotary == RotaryPairs::none || problem.head_dim % 2 == 0,
                  "layer.rotary {} turns pairs of elements, and head-dim {} is odd", to_string(layer.rotary), problem.head_dim);
  ANNULUS_EXPECTS(std::isfinite(layer.gate_temperature) && layer.gate_temperature > 0, "layer.gate-temperature {} is not positive",
                  layer.gate_temperature);
  ANNULUS_EXPECTS(layer.zero_tokens >= 0 && layer.zero_tokens < kMaxExtraKeys, "layer.zero-tokens {} is outside 0..{}", layer.zero_tokens,
                  kMaxExtraKeys - 1);
  ANNULUS_EXPECTS(pattern.order == SequenceOrder::linear, "a layer takes its rows in their own order, and --order is {}",
                  to_string(pattern.order));
}

}  // namespace annulus
