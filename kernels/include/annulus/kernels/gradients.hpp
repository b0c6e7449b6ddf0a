// SPDX-License-Identifier: Apache-2.0
// What the kernels on host memory do around the products of a backward pass, a row or an element at a time.
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace annulus::kernels {

/// As BeginGradientsTask says, for one (batch, row, head). @tparam Number  of the partials
template <class Number, class Element>
void begin_gradients_of_row(const BeginGradientsTask& task, std::int64_t stat_at, std::int64_t acc_at) {
  const FinishTask& forward = task.forward;
  const auto max_of = [&](int g) -> Number& { return static_cast<Number*>(forward.partial[g].max)[stat_at]; };
  const auto sum_of = [&](int g) -> Number& { return static_cast<Number*>(forward.partial[g].sum)[stat_at]; };
  const auto* dout = static_cast<const Element*>(task.dout) + acc_at;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();

  double largest = -kInfinity;
  int covering = 0;
  for (int g = 0; g < forward.partials; ++g) {
    if (sum_of(g) == Number{0}) { continue; }
    largest = std::max(largest, static_cast<double>(max_of(g)));
    ++covering;
  }
  // Of one softmax over the keys of all partials: the sum of its exponentials, and <dO, O> times that.
  double total = 0.0;
  double weighted = 0.0;
  const double averaged = forward.combine == Combine::mean && covering > 0 ? covering : 1;
  const double log_factor = std::log(forward.output_scale / averaged);
  for (int g = 0; g < forward.partials; ++g) {
    if (sum_of(g) == Number{0}) {
      max_of(g) = std::numeric_limits<Number>::infinity();
      continue;
    }
    const auto* acc = static_cast<const Number*>(forward.partial[g].acc) + acc_at;
    double product = 0.0;
    for (std::int64_t d = 0; d < forward.head_dim; ++d) { product += static_cast<double>(acc[d]) * static_cast<double>(to_float(dout[d])); }
    const double max = static_cast<double>(max_of(g));
    const double sum = static_cast<double>(sum_of(g));
    total += std::exp(max - largest) * sum;
    weighted += std::exp(max - largest) * product;
    max_of(g) = static_cast<Number>(max + std::log(sum) - log_factor);
    sum_of(g) = static_cast<Number>(product / sum);
  }
  for (int g = 0; forward.combine == Combine::lse && g < forward.partials; ++g) {
    if (std::isinf(max_of(g)) && max_of(g) > 0) { continue; }
    max_of(g) = static_cast<Number>(largest + std::log(total) - log_factor);
    sum_of(g) = static_cast<Number>(weighted / total);
  }
  auto* dq = static_cast<Number*>(forward.partial[0].acc) + acc_at;
  for (std::int64_t d = 0; d < forward.head_dim; ++d) { dq[d] = Number{0}; }
}

/// As AddTask says, for one (batch, row).
inline void add_row(const AddTask& task, std::int64_t batch, std::int64_t row) {
  for (std::int64_t head = 0; head < task.heads; ++head) {
    const float* src = task.src + ((batch * task.rows + row) * task.heads + head) * task.head_dim;
    float* dst = task.dst + batch * task.dst_batch_stride + row * task.dst_row_stride + head * task.dst_head_stride;
    for (std::int64_t d = 0; d < task.head_dim; ++d) { dst[d] += src[d]; }
  }
}

}  // namespace annulus::kernels
