// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/reference.hpp>

#include "host_backend.hpp"

namespace annulus {
namespace {

class ReferenceBackend final : public HostBackend {
 public:
  explicit ReferenceBackend(std::atomic<std::uint64_t>* progress) : progress_(progress) {}
  BackendKind kind() const override { return BackendKind::reference; }
  std::string describe() const override { return "reference: fp64, plain loops, 1 thread"; }
  std::int64_t accumulator_bytes() const override { return sizeof(double); }
  std::int64_t workspace_bytes(std::int64_t /*head_dim*/, DType /*dtype*/) const override { return 0; }

  void fill_identity(Queue& /*queue*/, const kernels::PartialPointers& partial, std::int64_t rows, std::int64_t head_dim) override {
    kernels::reference::fill_identity(partial, rows, head_dim);
  }
  void add_zero_keys(Queue& /*queue*/, std::span<const kernels::ZeroKeysTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      kernels::reference::add_zero_keys(task);
    }
  }
  void pack(Queue& /*queue*/, std::span<const kernels::PackTask> tasks) override {
    for (const auto& task : tasks) {
      check_task(task);
      kernels::reference::pack(task);
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

 private:
  std::atomic<std::uint64_t>* progress_;
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend(const BackendOptions& options) {
  return std::make_unique<ReferenceBackend>(options.progress);
}

}  // namespace annulus
