// SPDX-License-Identifier: Apache-2.0
// TransformGradientTask for one row on a CPU, in fp32 or fp64.
#pragma once

#include <annulus/kernels/layer_gradients.hpp>
#include <annulus/kernels/transform_row.hpp>

#include <cmath>
#include <cstdint>
#include <vector>

namespace annulus::kernels {

/// d gate_value / dz; relu's is 0 at 0.
template <class Real>
Real gate_slope(Gate gate, Real z) {
  switch (gate) {
    case Gate::sigmoid: {
      // e^-|z| / (1 + e^-|z|)^2 is even in z and does not overflow.
      const Real small = std::exp(-std::abs(z));
      return small / ((Real{1} + small) * (Real{1} + small));
    }
    case Gate::tanh: {
      const Real value = std::tanh(z);
      return (Real{1} - value) * (Real{1} + value);
    }
    case Gate::relu:
      if (std::isnan(z)) { return z; }
      return z > Real{0} ? Real{1} : Real{0};
    case Gate::gelu: {
      constexpr auto kSqrtHalf = static_cast<Real>(0.70710678118654752440);
      constexpr auto kDensityAtZero = static_cast<Real>(0.39894228040143267794);  // 1 / sqrt(2 pi)
      return static_cast<Real>(0.5) * std::erfc(-z * kSqrtHalf) + z * kDensityAtZero * std::exp(static_cast<Real>(-0.5) * z * z);
    }
    case Gate::none:
      break;
  }
  return Real{0};
}

/// One row: `values` [features] holds the forward's input and is overwritten, `gradient` [features] holds dout and becomes din. dgate_in is
/// stored and the sums over rows are added to the task's own. `frequencies` are rotary_frequencies(); `scratch` has room for a row.
///
/// With n = (x - m) f, f = 1 / sqrt(v + epsilon) and e the gradient of n: dx = f (e - mean(e) - n mean(e n)), without mean(e) for rms,
/// where m is 0. That is exact for any epsilon: v's derivative is 2 (x - m) / count, since x - m sums to 0.
template <class Real>
void transform_row_gradient(const TransformGradientTask& task, const std::vector<double>& frequencies, std::int64_t row, Real* values,
                            Real* gradient, Real* scratch) {
  const TransformTask& forward = task.forward;
  if (forward.gate != Gate::none) {
    TransformTask ungated = forward;
    ungated.gate = Gate::none;
    for (std::int64_t i = 0; i < forward.features; ++i) { scratch[i] = values[i]; }
    transform_row(ungated, frequencies, row, scratch);
    const auto temperature = static_cast<Real>(forward.gate_temperature);
    const float* gate = forward.gate_in + row * forward.features;
    for (std::int64_t i = 0; i < forward.features; ++i) {
      const Real bias = forward.gate_bias == nullptr ? Real{0} : static_cast<Real>(forward.gate_bias[i]);
      const Real z = (static_cast<Real>(gate[i]) + bias) / temperature;
      const Real of_gate = gradient[i] * scratch[i] * gate_slope(forward.gate, z) / temperature;
      if (task.dgate_in != nullptr) { task.dgate_in[row * forward.features + i] = static_cast<float>(of_gate); }
      if (task.dgate_bias != nullptr) { task.dgate_bias[i] += static_cast<double>(of_gate); }
      gradient[i] *= gate_value(forward.gate, z);
    }
  }

  // A rotation's transpose is the rotation back.
  turn_row(forward, frequencies, row, Turn::back, gradient);

  if (forward.norm != Norm::none) {
    if (forward.bias != nullptr) {
      for (std::int64_t i = 0; i < forward.features; ++i) { values[i] += static_cast<Real>(forward.bias[i]); }
    }
    const auto count = static_cast<double>(forward.norm_features);
    for (std::int64_t first = 0; first < forward.features; first += forward.norm_features) {
      Real* x = values + first;
      Real* of_x = gradient + first;
      const RowStatistics statistics = row_statistics(forward, x);
      const auto normalised = [&](std::int64_t i) { return (static_cast<double>(x[i]) - statistics.mean) * statistics.factor; };
      const auto weight = [&](std::int64_t i) {
        return forward.norm_weight == nullptr ? 1.0 : static_cast<double>(forward.norm_weight[i]);
      };
      double sum = 0;
      double product = 0;
      for (std::int64_t i = 0; i < forward.norm_features; ++i) {
        const auto of_row = static_cast<double>(of_x[i]);
        if (task.dnorm_weight != nullptr) { task.dnorm_weight[i] += of_row * normalised(i); }
        if (task.dnorm_bias != nullptr) { task.dnorm_bias[i] += of_row; }
        sum += of_row * weight(i);
        product += of_row * weight(i) * normalised(i);
      }
      const double mean = forward.norm == Norm::layer ? sum / count : 0.0;
      for (std::int64_t i = 0; i < forward.norm_features; ++i) {
        const double centred = static_cast<double>(of_x[i]) * weight(i) - mean - normalised(i) * (product / count);
        of_x[i] = static_cast<Real>(centred * statistics.factor);
      }
    }
  }

  if (task.dbias != nullptr) {
    for (std::int64_t i = 0; i < forward.features; ++i) { task.dbias[i] += static_cast<double>(gradient[i]); }
  }
}

}  // namespace annulus::kernels
