// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/gradients.hpp>

#include <annulus/kernels/reference.hpp>
#include <annulus/kernels/visible_keys.hpp>

#include "narrow.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace annulus::kernels::reference {
namespace {

double wide(float value) { return static_cast<double>(value); }

/// The queries of one (batch, segment, kv_head) against one of its keys.
template <class Element>
class KeyRow {
 public:
  KeyRow(const GradientTask& task, std::int64_t batch, std::int64_t segment, std::int64_t kv_head)
      : task_(task),
        at_(task.attend),
        batch_(batch),
        segment_(segment),
        kv_head_(kv_head),
        dk_(static_cast<std::size_t>(task.attend.head_dim)),
        dv_(dk_) {}

  void run(std::int64_t k_row) {
    std::fill(dk_.begin(), dk_.end(), 0.0);
    std::fill(dv_.begin(), dv_.end(), 0.0);
    const std::int64_t key = offset(at_.kv_strides, k_row, 0);
    for (std::int64_t head = 0; head < at_.q_per_kv; ++head) {
      for (std::int64_t q_row = 0; q_row < at_.q_rows; ++q_row) {
        if (k_row < visible_keys(at_, q_row)) { meet(head, q_row, k_row, key); }
      }
    }
    for (std::int64_t d = 0; d < at_.head_dim; ++d) {
      task_.dk[key + d] = static_cast<float>(wide(task_.dk[key + d]) + dk_[static_cast<std::size_t>(d)]);
      task_.dv[key + d] = static_cast<float>(wide(task_.dv[key + d]) + dv_[static_cast<std::size_t>(d)]);
    }
  }

 private:
  std::int64_t offset(const TaskStrides& strides, std::int64_t row, std::int64_t head) const {
    return batch_ * strides.batch + segment_ * strides.segment + row * strides.row + kv_head_ * strides.kv_head + head * strides.head;
  }

  /// What the probability of a key is multiplied by where it meets the value.
  double factor(std::int64_t head, std::int64_t q_row, std::int64_t k_row) const {
    return dropout_row(at_, batch_, segment_, kv_head_, head, q_row).factor(dropout_key(at_, segment_, k_row));
  }

  void meet(std::int64_t head, std::int64_t q_row, std::int64_t k_row, std::int64_t key) {
    const std::int64_t query = offset(at_.q_strides, q_row, head);
    const std::int64_t stat = offset(at_.stat_strides, q_row, head);
    const auto* q = static_cast<const Element*>(at_.q) + query;
    const auto* dout = static_cast<const Element*>(task_.dout) + query;
    const auto* k = static_cast<const Element*>(at_.k) + key;
    const auto* v = static_cast<const Element*>(at_.v) + key;
    double score = 0.0;
    double product = 0.0;
    for (std::int64_t d = 0; d < at_.head_dim; ++d) {
      score += wide(to_float(q[d])) * wide(to_float(k[d]));
      product += wide(to_float(dout[d])) * wide(to_float(v[d]));
    }
    const double probability = std::exp(at_.scale * score - static_cast<const double*>(at_.max)[stat]);
    const double dropped = factor(head, q_row, k_row);
    const double of_score = at_.scale * probability * (dropped * product - static_cast<const double*>(at_.sum)[stat]);
    auto* dq = static_cast<double*>(at_.acc) + offset(at_.acc_strides, q_row, head);
    for (std::int64_t d = 0; d < at_.head_dim; ++d) {
      dq[d] += of_score * wide(to_float(k[d]));
      dk_[static_cast<std::size_t>(d)] += of_score * wide(to_float(q[d]));
      dv_[static_cast<std::size_t>(d)] += dropped * probability * wide(to_float(dout[d]));
    }
  }

  const GradientTask& task_;
  const AttendTask& at_;
  std::int64_t batch_;
  std::int64_t segment_;
  std::int64_t kv_head_;
  std::vector<double> dk_;
  std::vector<double> dv_;
};

template <class Element>
void differentiate_as(const GradientTask& task, std::atomic<std::uint64_t>* progress) {
  for (std::int64_t b = 0; b < task.attend.batch; ++b) {
    for (std::int64_t s = 0; s < task.attend.segments; ++s) {
      for (std::int64_t kv_head = 0; kv_head < task.attend.kv_heads; ++kv_head) {
        KeyRow<Element> keys(task, b, s, kv_head);
        for (std::int64_t k_row = 0; k_row < task.attend.k_rows; ++k_row) {
          keys.run(k_row);
          if (progress != nullptr) { progress->fetch_add(1, std::memory_order_relaxed); }
        }
      }
    }
  }
}

}  // namespace

void begin_gradients(const BeginGradientsTask& task) {
  with_element(task.forward.dtype, [&](auto tag) {
    const FinishTask& forward = task.forward;
    for (std::int64_t i = 0; i < forward.batch * forward.rows; ++i) {
      for (std::int64_t head = 0; head < forward.heads; ++head) {
        begin_gradients_of_row<double, decltype(tag)>(task, (i / forward.rows * forward.heads + head) * forward.rows + i % forward.rows,
                                                      (i * forward.heads + head) * forward.head_dim);
      }
    }
  });
}

void differentiate(const GradientTask& task, std::atomic<std::uint64_t>* progress) {
  with_element(task.attend.dtype, [&](auto tag) { differentiate_as<decltype(tag)>(task, progress); });
}

void clear(const ClearTask& task) { std::fill(task.data, task.data + task.count, 0.0F); }

void add(const AddTask& task) {
  for (std::int64_t b = 0; b < task.batch; ++b) {
    for (std::int64_t row = 0; row < task.rows; ++row) { add_row(task, b, row); }
  }
}

void round(const RoundTask& task) {
  with_element(task.dtype, [&](auto tag) {
    using Element = decltype(tag);
    auto* dst = static_cast<Element*>(task.dst);
    const bool is_double = task.source_bytes == static_cast<std::int64_t>(sizeof(double));
    for (std::int64_t i = 0; i < task.count; ++i) {
      dst[i] = narrow<Element>(is_double ? static_cast<const double*>(task.src)[i] : wide(static_cast<const float*>(task.src)[i]));
    }
  });
}

}  // namespace annulus::kernels::reference
