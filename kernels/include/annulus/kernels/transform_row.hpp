// SPDX-License-Identifier: Apache-2.0
// TransformTask for one row on a CPU, in fp32 or fp64.
#pragma once

#include <annulus/kernels/layer.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus::kernels {

/// function((z + bias) / temperature) of TransformTask.
template <class Real>
Real gate_value(Gate gate, Real z) {
  switch (gate) {
    case Gate::sigmoid:
      return Real{1} / (Real{1} + std::exp(-z));
    case Gate::tanh:
      return std::tanh(z);
    case Gate::relu:
      return z < Real{0} ? Real{0} : z;  // NaN stays NaN
    case Gate::gelu: {
      constexpr auto kSqrtHalf = static_cast<Real>(0.70710678118654752440);
      return z * static_cast<Real>(0.5) * std::erfc(-z * kSqrtHalf);
    }
    case Gate::none:
      break;
  }
  return Real{1};
}

/// rotary_base^(-2i / head_dim) for each pair i of a head.
inline std::vector<double> rotary_frequencies(const TransformTask& task) {
  std::vector<double> frequencies;
  if (task.rotary == RotaryPairs::none) { return frequencies; }
  for (std::int64_t pair = 0; pair < task.head_dim / 2; ++pair) {
    frequencies.push_back(std::pow(task.rotary_base, -2.0 * static_cast<double>(pair) / static_cast<double>(task.head_dim)));
  }
  return frequencies;
}

/// What a norm takes from the elements that it normalises together.
struct RowStatistics {
  double mean = 0;    ///< 0 for rms
  double factor = 0;  ///< 1 / sqrt(mean of squared distances + epsilon)
};

/// Those of part [task.norm_features].
template <class Real>
RowStatistics row_statistics(const TransformTask& task, const Real* part) {
  const auto count = static_cast<double>(task.norm_features);
  RowStatistics statistics;
  if (task.norm == Norm::layer) {
    for (std::int64_t i = 0; i < task.norm_features; ++i) { statistics.mean += static_cast<double>(part[i]); }
    statistics.mean /= count;
  }
  double squares = 0;
  for (std::int64_t i = 0; i < task.norm_features; ++i) {
    const double distance = static_cast<double>(part[i]) - statistics.mean;
    squares += distance * distance;
  }
  statistics.factor = 1.0 / std::sqrt(squares / count + task.norm_epsilon);
  return statistics;
}

/// Which way the rotary embedding turns.
enum class Turn { onwards, back };

/// Turns all pairs of a row's heads, if the task turns any.
template <class Real>
void turn_row(const TransformTask& task, const std::vector<double>& frequencies, std::int64_t row, Turn turn, Real* values) {
  if (task.rotary == RotaryPairs::none) { return; }
  const std::int64_t pairs = task.head_dim / 2;
  const bool neighbours = task.rotary == RotaryPairs::neighbouring;
  const auto position = static_cast<double>(task.first_position + row);
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    const double angle = position * frequencies[static_cast<std::size_t>(pair)];
    const auto cosine = static_cast<Real>(std::cos(angle));
    const auto sine = static_cast<Real>(turn == Turn::onwards ? std::sin(angle) : -std::sin(angle));
    for (std::int64_t head = 0; head < task.features; head += task.head_dim) {
      Real& a = values[head + (neighbours ? 2 * pair : pair)];
      Real& b = values[head + (neighbours ? 2 * pair + 1 : pair + pairs)];
      const Real turned = a * cosine - b * sine;
      b = a * sine + b * cosine;
      a = turned;
    }
  }
}

/// values [task.features], which hold the row, become what the task makes of it, but for the last rounding. `frequencies` are
/// rotary_frequencies().
template <class Real>
void transform_row(const TransformTask& task, const std::vector<double>& frequencies, std::int64_t row, Real* values) {
  if (task.bias != nullptr) {
    for (std::int64_t i = 0; i < task.features; ++i) { values[i] += static_cast<Real>(task.bias[i]); }
  }

  if (task.norm != Norm::none) {
    for (std::int64_t first = 0; first < task.features; first += task.norm_features) {
      Real* part = values + first;
      const RowStatistics statistics = row_statistics(task, part);
      for (std::int64_t i = 0; i < task.norm_features; ++i) {
        const double weight = task.norm_weight == nullptr ? 1.0 : static_cast<double>(task.norm_weight[i]);
        const double bias = task.norm_bias == nullptr ? 0.0 : static_cast<double>(task.norm_bias[i]);
        part[i] = static_cast<Real>((static_cast<double>(part[i]) - statistics.mean) * statistics.factor * weight + bias);
      }
    }
  }

  turn_row(task, frequencies, row, Turn::onwards, values);

  if (task.gate != Gate::none) {
    const float* gate = task.gate_in + row * task.features;
    for (std::int64_t i = 0; i < task.features; ++i) {
      const Real bias = task.gate_bias == nullptr ? Real{0} : static_cast<Real>(task.gate_bias[i]);
      const Real z = (static_cast<Real>(gate[i]) + bias) / static_cast<Real>(task.gate_temperature);
      values[i] *= gate_value(task.gate, z);
    }
  }
}

}  // namespace annulus::kernels
