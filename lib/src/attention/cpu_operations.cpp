// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/kernels/cpu.hpp>

#include "check_task.hpp"
#include "task_operations.hpp"

#include <algorithm>
#include <exception>

namespace annulus {
namespace {

namespace cpu = kernels::cpu;

class CpuOperations final : public TaskOperations, public GradientOperations {
 public:
  CpuOperations(const cpu::Settings& settings, Device& device) : settings_(settings), device_(device) {}
  std::string describe() const override {
    return fmt::format("cpu: {} thread{}, {}", settings_.threads, settings_.threads == 1 ? "" : "s", cpu::describe());
  }
  std::int64_t workspace_bytes(std::int64_t head_dim, DType /*dtype*/) const override { return cpu::workspace_bytes(head_dim, settings_); }
  std::int64_t accumulator_bytes() const override { return sizeof(float); }

  void fill_identity(Queue& /*queue*/, const kernels::PartialPointers& partial, std::int64_t rows, std::int64_t head_dim) override {
    cpu::fill_identity(partial, rows, head_dim, settings_.threads);
  }
  void add_zero_keys(Queue& /*queue*/, std::span<const kernels::ZeroKeysTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      cpu::add_zero_keys(task);
    }
  }
  void attend(Queue& /*queue*/, std::span<const kernels::AttendTask> tasks) override {
    std::int64_t head_dim = 0;
    for (const auto& task : tasks) {
      check_task(task);
      head_dim = std::max(head_dim, task.head_dim);
    }
    if (tasks.empty()) { return; }
    reserve_workspace(cpu::workspace_bytes(head_dim, settings_));
    for (const auto& task : tasks) {
      try {
        cpu::attend(task, settings_, workspace_.get());
      } catch (const std::exception& error) { throw RuntimeFailure(fmt::format("backend cpu: attend: {}", error.what())); }
    }
  }
  void finish(Queue& /*queue*/, const kernels::FinishTask& task) override {
    check_task(task);
    cpu::finish(task, settings_.threads);
  }

  GradientOperations* gradients() override { return this; }
  std::int64_t gradient_workspace_bytes(std::int64_t head_dim, DType /*dtype*/) const override {
    return cpu::gradient_workspace_bytes(head_dim, settings_);
  }
  void begin_gradients(Queue& /*queue*/, const kernels::BeginGradientsTask& task) override {
    check_task(task);
    cpu::begin_gradients(task, settings_.threads);
  }
  void differentiate(Queue& /*queue*/, std::span<const kernels::GradientTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      reserve_workspace(cpu::gradient_workspace_bytes(task.attend.head_dim, settings_));
      try {
        cpu::differentiate(task, settings_, workspace_.get());
      } catch (const std::exception& error) { throw RuntimeFailure(fmt::format("backend cpu: differentiate: {}", error.what())); }
    }
  }
  void clear(Queue& /*queue*/, std::span<const kernels::ClearTask> tasks) override {
    for (const auto& task : tasks) { cpu::clear(task, settings_.threads); }
  }
  void add(Queue& /*queue*/, std::span<const kernels::AddTask> tasks) override {
    for (const auto& task : tasks) { cpu::add(task, settings_.threads); }
  }
  void round(Queue& /*queue*/, std::span<const kernels::RoundTask> tasks) override {
    for (const auto& task : tasks) { cpu::round(task, settings_.threads); }
  }

 private:
  /// Taken at the first attend() and kept: later ones need it again, and only a larger head_dim, or a backward pass, needs more.
  void reserve_workspace(std::int64_t bytes) {
    if (workspace_.bytes() >= bytes) { return; }
    workspace_.reset();
    workspace_ = device_.allocate(bytes, MemoryUse::tensor);
  }

  cpu::Settings settings_;
  Device& device_;
  Buffer workspace_;
};

}  // namespace

std::unique_ptr<TaskOperations> make_cpu_operations(const KernelOptions& options, Device& device) {
  ANNULUS_EXPECTS(options.threads >= 1, "threads must be at least 1, found {}", options.threads);
  ANNULUS_EXPECTS(options.tile_rows >= 0 && options.tile_rows <= cpu::kMaxTileRows,
                  "tile-rows {} is not in 0..{} (0 lets the kernel choose)", options.tile_rows, cpu::kMaxTileRows);
  if (!cpu::supported()) { throw RuntimeFailure("backend cpu: this CPU has neither AVX2 (with FMA and F16C) nor AVX-512"); }
  return std::make_unique<CpuOperations>(cpu::Settings{options.threads, options.tile_rows, options.progress}, device);
}

}  // namespace annulus
