// SPDX-License-Identifier: Apache-2.0
#include "task_kernel.hpp"

#include <annulus/core/error.hpp>
#include <annulus/plan/cost.hpp>

#include <algorithm>
#include <span>
#include <vector>

namespace annulus {
namespace {

class TaskAttention final : public PlannedAttention {
 public:
  TaskAttention(const RingPlan& plan, const TensorAddresses& addresses, TaskOperations& operations, Device& device);

  void warm_up(Queue& queue) override;
  void begin(Queue& queue) override;
  void attend(Queue& queue, std::int64_t step) override;
  void finish(Queue& queue) override;
  void begin_gradients(Queue& queue) override;
  void accumulate(Queue& queue, std::int64_t step) override;
  void differentiate(Queue& queue, std::int64_t step) override;
  void finish_gradients(Queue& queue) override;

 private:
  /// @throws AssertionFailure if there are none
  GradientOperations& gradients() const;

  TaskOperations& operations_;
  std::vector<Buffer> memory_;
  std::vector<kernels::PartialPointers> partials_;
  LoweredWork work_;
  LoweredGradients backward_;
};

TaskAttention::TaskAttention(const RingPlan& plan, const TensorAddresses& addresses, TaskOperations& operations, Device& device)
    : operations_(operations) {
  const Problem& problem = plan.problem;
  const std::int64_t stats = problem.batch * plan.local_rows * problem.heads;
  const std::int64_t accumulator = operations.accumulator_bytes();
  for (std::int64_t index = 0; index < plan.partials; ++index) {
    kernels::PartialPointers partial;
    partial.acc = memory_.emplace_back(device.allocate(stats * problem.head_dim * accumulator, MemoryUse::tensor)).get();
    partial.max = memory_.emplace_back(device.allocate(stats * accumulator, MemoryUse::tensor)).get();
    partial.sum = memory_.emplace_back(device.allocate(stats * accumulator, MemoryUse::tensor)).get();
    partials_.push_back(partial);
  }
  work_ = lower_work(plan, addresses, partials_, accumulator);
  if (plan.routing.gradients) { backward_ = lower_gradients(plan, addresses, partials_, accumulator); }
}

void TaskAttention::warm_up(Queue& queue) {
  // Enough for a whole tile of every kind; more of it would only take time.
  constexpr std::int64_t kRows = 4096;
  constexpr std::int64_t kSegments = 16;
  constexpr std::size_t kTasks = 8;
  constexpr std::size_t kSteps = 2;  // of resident keys, and of keys that came; later steps are like the second
  begin(queue);
  for (std::size_t step = 0; step < std::min(kSteps, work_.attend.size()); ++step) {
    std::vector<kernels::AttendTask> part = work_.attend[step];
    part.resize(std::min(part.size(), kTasks));
    for (kernels::AttendTask& task : part) {
      task.segments = std::min(task.segments, kSegments);
      task.q_rows = std::min(task.q_rows, kRows);
      task.k_rows = std::min(task.k_rows, kRows);
    }
    if (!part.empty()) { operations_.attend(queue, part); }
  }
  finish(queue);
  if (backward_.round.empty()) { return; }
  begin_gradients(queue);
  for (const std::vector<kernels::GradientTask>& tasks : backward_.differentiate) {
    if (tasks.empty()) { continue; }
    kernels::GradientTask task = tasks.front();
    task.attend.segments = std::min(task.attend.segments, kSegments);
    task.attend.q_rows = std::min(task.attend.q_rows, kRows);
    task.attend.k_rows = std::min(task.attend.k_rows, kRows);
    gradients().differentiate(queue, std::span(&task, 1));
    break;
  }
  for (const std::vector<kernels::AddTask>& tasks : backward_.add) {
    if (!tasks.empty()) { gradients().add(queue, std::span(tasks).first(1)); }
  }
  finish_gradients(queue);
}

void TaskAttention::begin(Queue& queue) {
  const kernels::FinishTask& all = work_.finish;
  const std::int64_t stats = all.batch * all.rows * all.heads;
  if (stats == 0) { return; }
  for (const kernels::PartialPointers& partial : partials_) { operations_.fill_identity(queue, partial, stats, all.head_dim); }
  if (!work_.zero_keys.empty()) { operations_.add_zero_keys(queue, work_.zero_keys); }
}

void TaskAttention::attend(Queue& queue, std::int64_t step) {
  const std::vector<kernels::AttendTask>& tasks = work_.attend[static_cast<std::size_t>(step)];
  if (!tasks.empty()) { operations_.attend(queue, tasks); }
}

void TaskAttention::finish(Queue& queue) {
  if (work_.finish.batch * work_.finish.rows > 0) { operations_.finish(queue, work_.finish); }
}

GradientOperations& TaskAttention::gradients() const {
  GradientOperations* const operations = operations_.gradients();
  ANNULUS_ASSERT(operations != nullptr, "{} has no backward pass", operations_.describe());
  return *operations;
}

void TaskAttention::begin_gradients(Queue& queue) {
  const kernels::FinishTask& all = backward_.begin.forward;
  if (all.batch * all.rows == 0) { return; }
  gradients().begin_gradients(queue, backward_.begin);
  gradients().clear(queue, backward_.clear_own);
}

void TaskAttention::accumulate(Queue& queue, std::int64_t step) {
  const std::vector<kernels::AddTask>& tasks = backward_.add[static_cast<std::size_t>(step)];
  if (!tasks.empty()) { gradients().add(queue, tasks); }
}

void TaskAttention::differentiate(Queue& queue, std::int64_t step) {
  const std::vector<kernels::ClearTask>& clear = backward_.clear[static_cast<std::size_t>(step)];
  const std::vector<kernels::GradientTask>& tasks = backward_.differentiate[static_cast<std::size_t>(step)];
  if (!clear.empty()) { gradients().clear(queue, clear); }
  if (!tasks.empty()) { gradients().differentiate(queue, tasks); }
}

void TaskAttention::finish_gradients(Queue& queue) {
  if (!backward_.round.empty()) { gradients().round(queue, backward_.round); }
}

}  // namespace

Int128 TaskKernel::plan_bytes(const RingPlan& plan) const {
  return whole_partials_bytes(plan.problem, sizes_of(plan), operations_->accumulator_bytes());
}

std::unique_ptr<PlannedAttention> TaskKernel::prepare(const RingPlan& plan, const TensorAddresses& addresses) {
  return std::make_unique<TaskAttention>(plan, addresses, *operations_, device_);
}

}  // namespace annulus
