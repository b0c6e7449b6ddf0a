// SPDX-License-Identifier: Apache-2.0
// What a backward pass does around differentiate(): all of it is bound by memory, so plain loops over threads do.
#include <annulus/kernels/gradients.hpp>

#include <annulus/kernels/cpu.hpp>

#include <cstdint>

namespace annulus::kernels::cpu {
namespace {

/// Below so many numbers, starting threads takes longer than the work.
constexpr std::int64_t kSerialNumbers = 1 << 14;

template <class Element>
void begin_gradients_as(const BeginGradientsTask& task, int threads) {
  const FinishTask& forward = task.forward;
  const std::int64_t rows = forward.batch * forward.rows;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * forward.heads * forward.head_dim > kSerialNumbers)
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t head = 0; head < forward.heads; ++head) {
      begin_gradients_of_row<float, Element>(task, (i / forward.rows * forward.heads + head) * forward.rows + i % forward.rows,
                                             (i * forward.heads + head) * forward.head_dim);
    }
  }
}

template <class Element>
void round_as(const RoundTask& task, int threads) {
  const auto* src = static_cast<const float*>(task.src);
  auto* dst = static_cast<Element*>(task.dst);
#pragma omp parallel for num_threads(threads) schedule(static) if (task.count > kSerialNumbers)
  for (std::int64_t i = 0; i < task.count; ++i) { dst[i] = from_float<Element>(src[i]); }
}

}  // namespace

void begin_gradients(const BeginGradientsTask& task, int threads) {
  with_element(task.forward.dtype, [&](auto tag) { begin_gradients_as<decltype(tag)>(task, threads); });
}

void clear(const ClearTask& task, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (task.count > kSerialNumbers)
  for (std::int64_t i = 0; i < task.count; ++i) { task.data[i] = 0.0F; }
}

void add(const AddTask& task, int threads) {
  const std::int64_t rows = task.batch * task.rows;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * task.heads * task.head_dim > kSerialNumbers)
  for (std::int64_t i = 0; i < rows; ++i) { add_row(task, i / task.rows, i % task.rows); }
}

void round(const RoundTask& task, int threads) {
  with_element(task.dtype, [&](auto tag) { round_as<decltype(tag)>(task, threads); });
}

}  // namespace annulus::kernels::cpu
