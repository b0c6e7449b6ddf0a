// SPDX-License-Identifier: Apache-2.0
// Everything but attention itself: all of it is bound by memory, so plain loops over threads do.
#include <annulus/kernels/cpu.hpp>
#include <annulus/kernels/zero_keys.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace annulus::kernels::cpu {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

/// Below so many numbers, starting threads takes longer than the work.
constexpr std::int64_t kSerialNumbers = 1 << 14;

/// exp(max - reference_max), and 0 for an empty partial even when both are -inf.
double weight_of(float max, float reference_max) {
  return max == kNegativeInfinity ? 0.0 : std::exp(static_cast<double>(max) - static_cast<double>(reference_max));
}

/// The partials of one (batch, row, head): where they are, and the factor that each acc takes into the output.
template <class Element>
void finish_row(const FinishTask& task, std::int64_t stat_at, std::int64_t acc_at) {
  const auto max_of = [&](int g) { return static_cast<const float*>(task.partial[g].max)[stat_at]; };
  const auto sum_of = [&](int g) { return static_cast<const float*>(task.partial[g].sum)[stat_at]; };
  float max = kNegativeInfinity;
  int covering = 0;
  for (int g = 0; g < task.partials; ++g) {
    if (max_of(g) > max) { max = max_of(g); }
    if (sum_of(g) != 0.0F && g != task.extra) { ++covering; }
  }
  auto* out = static_cast<Element*>(task.out) + acc_at;
  if (covering == 0 && (task.extra < 0 || sum_of(task.extra) == 0.0F)) {
    for (std::int64_t d = 0; d < task.head_dim; ++d) { out[d] = from_float<Element>(0.0F); }
    task.lse[stat_at] = kNegativeInfinity;
    return;
  }

  double total = 0.0;
  for (int g = 0; g < task.partials; ++g) { total += weight_of(max_of(g), max) * static_cast<double>(sum_of(g)); }
  task.lse[stat_at] = static_cast<float>(static_cast<double>(max) + std::log(total));

  double factor[kMaxPartials];
  double factor_of_extra = 0.0;  // under mean and sum: what the other partials take of it together
  for (int g = 0; g < task.partials; ++g) {
    factor[g] = 0.0;
    if (sum_of(g) == 0.0F) { continue; }
    const auto sum = static_cast<double>(sum_of(g));
    if (task.combine == Combine::lse) {
      factor[g] = weight_of(max_of(g), max) / total;
    } else if (task.extra < 0) {
      factor[g] = 1.0 / sum;
    } else if (g != task.extra) {
      const float larger = std::max(max_of(g), max_of(task.extra));
      const double weight = weight_of(max_of(g), larger);
      const double weight_of_extra = weight_of(max_of(task.extra), larger);
      const double both = weight * sum + weight_of_extra * static_cast<double>(sum_of(task.extra));
      factor[g] = weight / both;
      factor_of_extra += weight_of_extra / both;
    }
  }
  if (task.combine != Combine::lse && task.extra >= 0) {
    factor[task.extra] = covering > 0 ? factor_of_extra : 1.0 / static_cast<double>(sum_of(task.extra));
  }
  const double scale = task.combine == Combine::mean && covering > 0 ? task.output_scale / covering : task.output_scale;
  for (int g = 0; g < task.partials; ++g) { factor[g] *= scale; }
  for (std::int64_t d = 0; d < task.head_dim; ++d) {
    double value = 0.0;
    for (int g = 0; g < task.partials; ++g) {
      if (sum_of(g) != 0.0F) { value += factor[g] * static_cast<double>(static_cast<const float*>(task.partial[g].acc)[acc_at + d]); }
    }
    out[d] = from_float<Element>(static_cast<float>(value));
  }
}

template <class Element>
void finish_as(const FinishTask& task, int threads) {
  const std::int64_t rows = task.batch * task.rows;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * task.heads * task.head_dim > kSerialNumbers)
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t head = 0; head < task.heads; ++head) {
      finish_row<Element>(task, (i / task.rows * task.heads + head) * task.rows + i % task.rows, (i * task.heads + head) * task.head_dim);
    }
  }
}

}  // namespace

void fill_identity(const PartialPointers& partial, std::int64_t rows, std::int64_t head_dim, int threads) {
  auto* acc = static_cast<float*>(partial.acc);
  auto* max = static_cast<float*>(partial.max);
  auto* sum = static_cast<float*>(partial.sum);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * head_dim > kSerialNumbers)
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t d = 0; d < head_dim; ++d) { acc[row * head_dim + d] = 0.0F; }
    max[row] = kNegativeInfinity;
    sum[row] = 0.0F;
  }
}

void add_zero_keys(const ZeroKeysTask& task) { add_zero_keys_as<float>(task); }

void pack(const PackTask& task, int threads) {
  const auto* src = static_cast<const std::byte*>(task.src);
  auto* dst = static_cast<std::byte*>(task.dst);
  const std::int64_t head_bytes = task.head_dim * task.element_size;
  const std::int64_t rows = task.batch * task.rows;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * task.heads * task.head_dim > kSerialNumbers)
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t row_at = i / task.rows * task.src_batch_stride + i % task.rows * task.src_row_stride;
    for (std::int64_t head = 0; head < task.heads; ++head) {
      std::memcpy(dst + (i * task.heads + head) * head_bytes, src + (row_at + head * task.src_head_stride) * task.element_size,
                  static_cast<std::size_t>(head_bytes));
    }
  }
}

void finish(const FinishTask& task, int threads) {
  with_element(task.dtype, [&](auto tag) { finish_as<decltype(tag)>(task, threads); });
}

}  // namespace annulus::kernels::cpu
