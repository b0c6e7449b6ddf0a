// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/layer_gradients.hpp>

#include <annulus/kernels/transform_row_gradient.hpp>

#include "narrow.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus::kernels::reference {

void linear_gradient(const LinearGradientTask& task) {
  with_element(task.dtype, [&](auto tag) {
    using Element = decltype(tag);
    for (std::int64_t row = 0; row < task.rows && task.din != nullptr; ++row) {
      for (std::int64_t i = 0; i < task.in_features; ++i) {
        float& din = task.din[row * task.in_features + i];
        auto sum = static_cast<double>(din);
        for (std::int64_t column = 0; column < task.out_features; ++column) {
          sum +=
              static_cast<double>(task.dout[row * task.out_features + column]) * at<Element>(task.weight, i * task.out_features + column);
        }
        din = static_cast<float>(sum);
      }
    }
    for (std::int64_t i = 0; i < task.in_features && task.dweight != nullptr; ++i) {
      for (std::int64_t column = 0; column < task.out_features; ++column) {
        double& dweight = task.dweight[i * task.out_features + column];
        for (std::int64_t row = 0; row < task.rows; ++row) {
          dweight += at<Element>(task.in, row * task.in_features + i) * static_cast<double>(task.dout[row * task.out_features + column]);
        }
      }
    }
  });
}

void transform_rows_gradient(const TransformGradientTask& task) {
  const std::vector<double> frequencies = rotary_frequencies(task.forward);
  const std::int64_t features = task.forward.features;
  std::vector<double> values(static_cast<std::size_t>(features));
  std::vector<double> gradient(static_cast<std::size_t>(features));
  std::vector<double> scratch(static_cast<std::size_t>(features));
  for (std::int64_t row = 0; row < task.forward.rows; ++row) {
    with_element(task.forward.in_dtype, [&](auto tag) {
      for (std::int64_t i = 0; i < features; ++i) {
        values[static_cast<std::size_t>(i)] = at<decltype(tag)>(task.forward.in, row * features + i);
        gradient[static_cast<std::size_t>(i)] = static_cast<double>(task.dout[row * features + i]);
      }
    });
    transform_row_gradient(task, frequencies, row, values.data(), gradient.data(), scratch.data());
    for (std::int64_t i = 0; i < features && task.din != nullptr; ++i) {
      task.din[row * features + i] = static_cast<float>(gradient[static_cast<std::size_t>(i)]);
    }
  }
}

}  // namespace annulus::kernels::reference
