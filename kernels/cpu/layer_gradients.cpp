// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/layer_gradients.hpp>

#include <annulus/kernels/transform_row_gradient.hpp>

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus::kernels::cpu {
namespace {

constexpr std::int64_t kLine = 16;       // floats of 64 bytes, which the workspace's parts are multiples of
constexpr std::int64_t kGroupRows = 32;  // rows whose sums are made together; groups are added in ascending order, whoever made them

std::int64_t whole_lines(std::int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

/// Of linear_gradient()'s workspace, in floats.
struct Parts {
  std::int64_t transposed = 0;
  std::int64_t product = 0;
};

Parts parts_of(const LinearGradientTask& task) {
  Parts parts;
  const std::int64_t weights = task.in_features * task.out_features;
  const std::int64_t inputs = task.rows * task.in_features;
  // The two products come one after the other, through the same memory.
  parts.transposed = whole_lines(std::max(task.din == nullptr ? 0 : weights, task.dweight == nullptr ? 0 : inputs));
  parts.product = whole_lines(std::max(task.din == nullptr ? 0 : inputs, task.dweight == nullptr ? 0 : weights));
  return parts;
}

/// to [columns, rows] of from [rows, columns], widened.
void transpose(DType dtype, const void* from, std::int64_t rows, std::int64_t columns, int threads, float* to) {
  constexpr std::int64_t kTile = 32;  // a tile of both sides stays in the first cache
  with_element(dtype, [&](auto tag) {
    const auto* elements = static_cast<const decltype(tag)*>(from);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t first = 0; first < columns; first += kTile) {
      const std::int64_t end = std::min(columns, first + kTile);
      for (std::int64_t first_row = 0; first_row < rows; first_row += kTile) {
        const std::int64_t end_row = std::min(rows, first_row + kTile);
        for (std::int64_t column = first; column < end; ++column) {
          for (std::int64_t row = first_row; row < end_row; ++row) { to[column * rows + row] = to_float(elements[row * columns + column]); }
        }
      }
    }
  });
}

/// to += from, element by element.
template <class Sum>
void add(const float* from, std::int64_t count, int threads, Sum* to) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < count; ++i) { to[i] += static_cast<Sum>(from[i]); }
}

/// The sums of one group of rows, behind one another.
class GroupSums {
 public:
  explicit GroupSums(const TransformGradientTask& task)
      : parts_{{task.dbias, task.forward.features},
               {task.dnorm_weight, task.forward.norm_features},
               {task.dnorm_bias, task.forward.norm_features},
               {task.dgate_bias, task.forward.features}} {
    std::int64_t count = 0;
    for (const Part& part : parts_) { count += part.total == nullptr ? 0 : part.count; }
    sums_.resize(static_cast<std::size_t>(count));
  }

  /// The task with its sums going to this group's, which are cleared.
  TransformGradientTask redirected(TransformGradientTask task) {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    double* next = sums_.data();
    double** const targets[] = {&task.dbias, &task.dnorm_weight, &task.dnorm_bias, &task.dgate_bias};
    for (std::size_t i = 0; i < std::size(parts_); ++i) {
      if (parts_[i].total == nullptr) { continue; }
      *targets[i] = next;
      next += parts_[i].count;
    }
    return task;
  }

  /// Adds them to the task's.
  void add_to_totals() const {
    const double* next = sums_.data();
    for (const Part& part : parts_) {
      if (part.total == nullptr) { continue; }
      for (std::int64_t i = 0; i < part.count; ++i) { part.total[i] += next[i]; }
      next += part.count;
    }
  }

 private:
  struct Part {
    double* total;
    std::int64_t count;
  };
  Part parts_[4];
  std::vector<double> sums_;
};

}  // namespace

std::int64_t linear_gradient_workspace_bytes(const LinearGradientTask& task, int threads) {
  const Parts parts = parts_of(task);
  return linear_workspace_bytes(threads) + (parts.transposed + parts.product) * static_cast<std::int64_t>(sizeof(float));
}

void linear_gradient(const LinearGradientTask& task, int threads, void* workspace) {
  if (task.rows == 0) { return; }
  auto* transposed = reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + linear_workspace_bytes(threads));
  float* product = transposed + parts_of(task).transposed;
  if (task.din != nullptr) {
    transpose(task.dtype, task.weight, task.in_features, task.out_features, threads, transposed);
    linear({DType::fp32, DType::fp32, task.rows, task.out_features, task.in_features, task.dout, transposed, product}, threads, workspace);
    add(product, task.rows * task.in_features, threads, task.din);
  }
  if (task.dweight != nullptr) {
    transpose(task.dtype, task.in, task.rows, task.in_features, threads, transposed);
    linear({DType::fp32, DType::fp32, task.in_features, task.rows, task.out_features, transposed, task.dout, product}, threads, workspace);
    add(product, task.in_features * task.out_features, threads, task.dweight);
  }
}

void transform_rows_gradient(const TransformGradientTask& task, int threads) {
  const std::vector<double> frequencies = rotary_frequencies(task.forward);
  const std::int64_t features = task.forward.features;
  const std::int64_t groups = (task.forward.rows + kGroupRows - 1) / kGroupRows;
  std::vector<GroupSums> sums(static_cast<std::size_t>(threads), GroupSums(task));
  std::vector<float> rows(static_cast<std::size_t>(3 * features * threads));
  for (std::int64_t first = 0; first < groups; first += threads) {
    const std::int64_t together = std::min<std::int64_t>(threads, groups - first);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (std::int64_t group = 0; group < together; ++group) {
      const TransformGradientTask of_group = sums[static_cast<std::size_t>(group)].redirected(task);
      float* values = rows.data() + group * 3 * features;
      float* gradient = values + features;
      const std::int64_t end = std::min(task.forward.rows, (first + group + 1) * kGroupRows);
      for (std::int64_t row = (first + group) * kGroupRows; row < end; ++row) {
        with_element(task.forward.in_dtype, [&](auto tag) {
          const auto* in = static_cast<const decltype(tag)*>(task.forward.in) + row * features;
          for (std::int64_t i = 0; i < features; ++i) { values[i] = to_float(in[i]); }
        });
        std::copy_n(task.dout + row * features, features, gradient);
        transform_row_gradient(of_group, frequencies, row, values, gradient, gradient + features);
        if (task.din != nullptr) { std::copy_n(gradient, features, task.din + row * features); }
      }
    }
    for (std::int64_t group = 0; group < together; ++group) { sums[static_cast<std::size_t>(group)].add_to_totals(); }
  }
}

}  // namespace annulus::kernels::cpu
