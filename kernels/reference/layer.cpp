// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/layer.hpp>

#include <annulus/kernels/transform_row.hpp>

#include "narrow.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus::kernels::reference {

void linear(const LinearTask& task) {
  with_element(task.dtype, [&](auto in_tag) {
    using In = decltype(in_tag);
    with_element(task.out_dtype, [&](auto out_tag) {
      using Out = decltype(out_tag);
      for (std::int64_t row = 0; row < task.rows; ++row) {
        for (std::int64_t column = 0; column < task.out_features; ++column) {
          double sum = 0;
          for (std::int64_t i = 0; i < task.in_features; ++i) {
            sum += at<In>(task.in, row * task.in_features + i) * at<In>(task.weight, i * task.out_features + column);
          }
          static_cast<Out*>(task.out)[row * task.out_features + column] = narrow<Out>(sum);
        }
      }
    });
  });
}

void transform_rows(const TransformTask& task) {
  const std::vector<double> frequencies = rotary_frequencies(task);
  std::vector<double> values(static_cast<std::size_t>(task.features));
  for (std::int64_t row = 0; row < task.rows; ++row) {
    with_element(task.in_dtype, [&](auto tag) {
      for (std::int64_t i = 0; i < task.features; ++i) {
        values[static_cast<std::size_t>(i)] = at<decltype(tag)>(task.in, row * task.features + i);
      }
    });
    transform_row(task, frequencies, row, values.data());
    with_element(task.out_dtype, [&](auto tag) {
      using Element = decltype(tag);
      for (std::int64_t i = 0; i < task.features; ++i) {
        static_cast<Element*>(task.out)[row * task.features + i] = narrow<Element>(values[static_cast<std::size_t>(i)]);
      }
    });
  }
}

}  // namespace annulus::kernels::reference
