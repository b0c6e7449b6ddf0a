// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/core/problem.hpp>
#include <annulus/kernels/cpu.hpp>

#include "host_backend.hpp"

#include <algorithm>
#include <exception>

namespace annulus {
namespace {

namespace cpu = kernels::cpu;

class CpuBackend final : public HostBackend {
 public:
  explicit CpuBackend(const cpu::Settings& settings) : settings_(settings) {}
  BackendKind kind() const override { return BackendKind::cpu; }
  std::string describe() const override {
    return fmt::format("cpu: {} thread{}, {}", settings_.threads, settings_.threads == 1 ? "" : "s", cpu::describe());
  }
  std::int64_t accumulator_bytes() const override { return sizeof(float); }
  std::int64_t workspace_bytes(std::int64_t head_dim, DType /*dtype*/) const override { return cpu::workspace_bytes(head_dim, settings_); }

  void fill_identity(Queue& /*queue*/, const kernels::PartialPointers& partial, std::int64_t rows, std::int64_t head_dim) override {
    cpu::fill_identity(partial, rows, head_dim, settings_.threads);
  }
  void add_zero_keys(Queue& /*queue*/, std::span<const kernels::ZeroKeysTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      cpu::add_zero_keys(task);
    }
  }
  void pack(Queue& /*queue*/, std::span<const kernels::PackTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      cpu::pack(task, settings_.threads);
    }
  }
  void attend(Queue& /*queue*/, std::span<const kernels::AttendTask> tasks) override {
    std::int64_t head_dim = 0;
    for (const auto& task : tasks) {
      check_task(task);
      head_dim = std::max(head_dim, task.head_dim);
    }
    if (tasks.empty()) { return; }
    reserve_workspace(head_dim);
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

 protected:
  std::int64_t own_bytes() const override { return workspace_.bytes(); }

 private:
  /// Taken at the first attend() and kept: later ones need it again, and only a larger head_dim needs more.
  void reserve_workspace(std::int64_t head_dim) {
    const std::int64_t bytes = cpu::workspace_bytes(head_dim, settings_);
    if (workspace_.bytes() >= bytes) { return; }
    workspace_.reset();
    workspace_ = allocate(bytes, MemoryUse::tensor);
  }

  cpu::Settings settings_;
  Buffer workspace_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) {
  ANNULUS_EXPECTS(options.threads >= 1, "threads must be at least 1, found {}", options.threads);
  ANNULUS_EXPECTS(options.tile_rows >= 0 && options.tile_rows <= cpu::kMaxTileRows,
                  "tile-rows {} is not in 0..{} (0 lets the kernel choose)", options.tile_rows, cpu::kMaxTileRows);
  if (!cpu::supported()) { throw RuntimeFailure("backend cpu: this CPU has neither AVX2 (with FMA and F16C) nor AVX-512"); }
  return std::make_unique<CpuBackend>(cpu::Settings{options.threads, options.tile_rows, options.progress});
}

}  // namespace annulus
