// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/reference.hpp>

#include <annulus/kernels/visible_keys.hpp>
#include <annulus/kernels/zero_keys.hpp>

#include "narrow.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace annulus::kernels::reference {
namespace {

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();

/// exp(max - reference_max), and 0 for an empty partial even when both are -inf.
double weight_of(double max, double reference_max) { return max == kNegativeInfinity ? 0.0 : std::exp(max - reference_max); }

bool visible(const AttendTask& task, std::int64_t q_row, std::int64_t k_row) {
  switch (task.mask) {
    case Mask::none:
      return true;
    case Mask::causal:
      break;
  }
  // Segments shift both positions alike, so the comparison needs no segment.
  return task.k_positions.first + k_row * task.k_positions.stride <= task.q_positions.first + q_row * task.q_positions.stride;
}

/// One query row against one key and value, whose probability is multiplied by `factor` where it meets the value.
template <class Element>
void attend_key(const AttendTask& task, const Element* q, const Element* key, const Element* value, double factor, double* acc, double& max,
                double& sum) {
  double score = 0.0;
  for (std::int64_t d = 0; d < task.head_dim; ++d) { score += static_cast<double>(to_float(q[d])) * static_cast<double>(to_float(key[d])); }
  score *= task.scale;
  if (score == kNegativeInfinity) { return; }
  if (score > max) {
    const double correction = weight_of(max, score);
    for (std::int64_t d = 0; d < task.head_dim; ++d) { acc[d] *= correction; }
    sum *= correction;
    max = score;
  }
  const double probability = std::exp(score - max);
  for (std::int64_t d = 0; d < task.head_dim; ++d) { acc[d] += factor * probability * static_cast<double>(to_float(value[d])); }
  sum += probability;
}

/// One query row against the keys of one (batch, segment, kv_head) that the task has for it.
template <class Element, class FactorOf>
void attend_row(const AttendTask& task, const FactorOf& factor_of, std::int64_t q_row, const Element* q, const Element* k, const Element* v,
                double* acc, double& max, double& sum) {
  const auto meet = [&](std::int64_t k_row) {
    if (!visible(task, q_row, k_row)) { return; }
    attend_key(task, q, k + k_row * task.kv_strides.row, v + k_row * task.kv_strides.row, factor_of(k_row), acc, max, sum);
  };
  if (task.place.block_rows == 0) {
    for (std::int64_t k_row = 0; k_row < task.k_rows; ++k_row) { meet(k_row); }
    return;
  }
  const std::int64_t down = keys_down(task, q_row);
  if (task.place.part != KeyPart::above) {
    for (std::int64_t k_row = down - 1; k_row >= 0; --k_row) { meet(k_row); }
  }
  if (task.place.part != KeyPart::down) {
    for (std::int64_t k_row = task.k_rows - 1; k_row >= down; --k_row) { meet(k_row); }
  }
}

template <class Element>
void attend_as(const AttendTask& task, std::atomic<std::uint64_t>* progress) {
  const auto* q = static_cast<const Element*>(task.q);
  const auto* k = static_cast<const Element*>(task.k);
  const auto* v = static_cast<const Element*>(task.v);
  auto* acc = static_cast<double*>(task.acc);
  auto* max = static_cast<double*>(task.max);
  auto* sum = static_cast<double*>(task.sum);
  for (std::int64_t b = 0; b < task.batch; ++b) {
    for (std::int64_t s = 0; s < task.segments; ++s) {
      for (std::int64_t kv_head = 0; kv_head < task.kv_heads; ++kv_head) {
        for (std::int64_t head = 0; head < task.q_per_kv; ++head) {
          for (std::int64_t row = 0; row < task.q_rows; ++row) {
            const auto at = [&](const TaskStrides& strides) {
              return b * strides.batch + s * strides.segment + row * strides.row + kv_head * strides.kv_head + head * strides.head;
            };
            const TaskStrides& kv = task.kv_strides;
            const std::int64_t kv_at = b * kv.batch + s * kv.segment + kv_head * kv.kv_head;
            const std::int64_t stat_at = at(task.stat_strides);
            const DropoutRow draws = dropout_row(task, b, s, kv_head, head, row);
            const auto factor_of = [&](std::int64_t k_row) { return draws.factor(dropout_key(task, s, k_row)); };
            attend_row(task, factor_of, row, q + at(task.q_strides), k + kv_at, v + kv_at, acc + at(task.acc_strides), max[stat_at],
                       sum[stat_at]);
            if (progress != nullptr) { progress->fetch_add(1, std::memory_order_relaxed); }
          }
        }
      }
    }
  }
}

template <class Element>
void finish_as(const FinishTask& task) {
  auto* out = static_cast<Element*>(task.out);
  for (std::int64_t b = 0; b < task.batch; ++b) {
    for (std::int64_t head = 0; head < task.heads; ++head) {
      for (std::int64_t row = 0; row < task.rows; ++row) {
        const std::int64_t stat_at = (b * task.heads + head) * task.rows + row;
        const std::int64_t acc_at = ((b * task.rows + row) * task.heads + head) * task.head_dim;
        const auto max_of = [&](int g) { return static_cast<const double*>(task.partial[g].max)[stat_at]; };
        const auto sum_of = [&](int g) { return static_cast<const double*>(task.partial[g].sum)[stat_at]; };

        double max = kNegativeInfinity;
        int covering = 0;
        for (int g = 0; g < task.partials; ++g) {
          if (max_of(g) > max) { max = max_of(g); }
          if (sum_of(g) != 0.0 && g != task.extra) { ++covering; }
        }
        double total = 0.0;
        for (int g = 0; g < task.partials; ++g) { total += weight_of(max_of(g), max) * sum_of(g); }

        for (std::int64_t d = 0; d < task.head_dim; ++d) {
          const auto acc_of = [&](int g) { return static_cast<const double*>(task.partial[g].acc)[acc_at + d]; };
          // One softmax over the keys of the partials g and `with`, which may be none.
          const auto together = [&](int g, int with) {
            if (with < 0) { return acc_of(g) / sum_of(g); }
            const double larger = std::max(max_of(g), max_of(with));
            const double weight = weight_of(max_of(g), larger);
            const double weight_with = weight_of(max_of(with), larger);
            return (weight * acc_of(g) + weight_with * acc_of(with)) / (weight * sum_of(g) + weight_with * sum_of(with));
          };
          double value = 0.0;
          for (int g = 0; g < task.partials; ++g) {
            if (sum_of(g) == 0.0) { continue; }
            if (task.combine == Combine::lse) {
              value += weight_of(max_of(g), max) * acc_of(g) / total;
            } else if (g != task.extra) {
              value += together(g, task.extra);
            } else if (covering == 0) {
              value = together(g, -1);
            }
          }
          if (task.combine == Combine::mean && covering > 0) { value /= covering; }
          out[acc_at + d] = narrow<Element>(task.output_scale * value);
        }
        task.lse[stat_at] = static_cast<float>(total != 0.0 ? max + std::log(total) : kNegativeInfinity);
      }
    }
  }
}

}  // namespace

void fill_identity(const PartialPointers& partial, std::int64_t rows, std::int64_t head_dim) {
  for (std::int64_t i = 0; i < rows * head_dim; ++i) { static_cast<double*>(partial.acc)[i] = 0.0; }
  for (std::int64_t i = 0; i < rows; ++i) {
    static_cast<double*>(partial.max)[i] = kNegativeInfinity;
    static_cast<double*>(partial.sum)[i] = 0.0;
  }
}

void add_zero_keys(const ZeroKeysTask& task) { add_zero_keys_as<double>(task); }

void pack(const PackTask& task) {
  const auto* src = static_cast<const std::byte*>(task.src);
  auto* dst = static_cast<std::byte*>(task.dst);
  const std::int64_t row_bytes = task.head_dim * task.element_size;
  for (std::int64_t b = 0; b < task.batch; ++b) {
    for (std::int64_t row = 0; row < task.rows; ++row) {
      for (std::int64_t head = 0; head < task.heads; ++head) {
        const std::int64_t from = b * task.src_batch_stride + row * task.src_row_stride + head * task.src_head_stride;
        std::memcpy(dst, src + from * task.element_size, static_cast<std::size_t>(row_bytes));
        dst += row_bytes;
      }
    }
  }
}

void attend(const AttendTask& task, std::atomic<std::uint64_t>* progress) {
  with_element(task.dtype, [&](auto tag) { attend_as<decltype(tag)>(task, progress); });
}

void finish(const FinishTask& task) {
  with_element(task.dtype, [&](auto tag) { finish_as<decltype(tag)>(task); });
}

}  // namespace annulus::kernels::reference
