// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/reference.hpp>

#include "check_task.hpp"
#include "task_operations.hpp"

namespace annulus {
namespace {

class ReferenceOperations final : public TaskOperations, public GradientOperations {
 public:
  explicit ReferenceOperations(std::atomic<std::uint64_t>* progress) : progress_(progress) {}
  std::string describe() const override { return "reference: fp64, plain loops, 1 thread"; }
  std::int64_t workspace_bytes(std::int64_t /*head_dim*/, DType /*dtype*/) const override { return 0; }
  std::int64_t accumulator_bytes() const override { return sizeof(double); }

  void fill_identity(Queue& /*queue*/, const kernels::PartialPointers& partial, std::int64_t rows, std::int64_t head_dim) override {
    kernels::reference::fill_identity(partial, rows, head_dim);
  }
  void add_zero_keys(Queue& /*queue*/, std::span<const kernels::ZeroKeysTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      kernels::reference::add_zero_keys(task);
    }
  }
  void attend(Queue& /*queue*/, std::span<const kernels::AttendTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      kernels::reference::attend(task, progress_);
    }
  }
  void finish(Queue& /*queue*/, const kernels::FinishTask& task) override {
    check_task(task);
    kernels::reference::finish(task);
  }

  GradientOperations* gradients() override { return this; }
  std::int64_t gradient_workspace_bytes(std::int64_t /*head_dim*/, DType /*dtype*/) const override { return 0; }
  void begin_gradients(Queue& /*queue*/, const kernels::BeginGradientsTask& task) override {
    check_task(task);
    kernels::reference::begin_gradients(task);
  }
  void differentiate(Queue& /*queue*/, std::span<const kernels::GradientTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      kernels::reference::differentiate(task, progress_);
    }
  }
  void clear(Queue& /*queue*/, std::span<const kernels::ClearTask> tasks) override {
    for (const auto& task : tasks) { kernels::reference::clear(task); }
  }
  void add(Queue& /*queue*/, std::span<const kernels::AddTask> tasks) override {
    for (const auto& task : tasks) { kernels::reference::add(task); }
  }
  void round(Queue& /*queue*/, std::span<const kernels::RoundTask> tasks) override {
    for (const auto& task : tasks) { kernels::reference::round(task); }
  }

 private:
  std::atomic<std::uint64_t>* progress_;
};

}  // namespace

std::unique_ptr<TaskOperations> make_reference_operations(const KernelOptions& options) {
  return std::make_unique<ReferenceOperations>(options.progress);
}

}  // namespace annulus
