// SPDX-License-Identifier: Apache-2.0
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/session/session.hpp>
#include <annulus_test.hpp>

#include "gpu/cuda_driver.hpp"
#include "mpi_world.hpp"

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <span>
#include <utility>

using namespace annulus;

namespace {

/// What was sent so far, and how much of it lies in memory that another process can map.
struct Sent {
  std::int64_t messages = 0;
  std::int64_t mappable = 0;
};

/// Asks of every message whether its memory has an IPC handle, as a CUDA-aware MPI does.
class MappableSends final : public Transport {
 public:
  MappableSends(std::unique_ptr<Transport> inner, Sent& sent) : inner_(std::move(inner)), sent_(sent) {}

  TransportKind kind() const override { return inner_->kind(); }
  std::int64_t rank() const override { return inner_->rank(); }
  std::int64_t ranks() const override { return inner_->ranks(); }
  void prepare(std::span<const StepMessages> steps) override { inner_->prepare(steps); }
  void ready(std::int64_t step, Queue& queue) override { inner_->ready(step, queue); }
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override {
    for (const Outgoing& message : sends) { note(message.data); }
    for (const Incoming& message : receives) { note(message.data); }
    inner_->post(step, sends, receives);
  }
  void wait(std::int64_t step, Queue& queue) override { inner_->wait(step, queue); }
  StepTraffic traffic(std::int64_t step) override { return inner_->traffic(step); }

 private:
  void note(const void* data) {
    ++sent_.messages;
    cudaIpcMemHandle_t handle{};
    if (cudaIpcGetMemHandle(&handle, CudaDriver::get().allocation_of(data).base) == cudaSuccess) { ++sent_.mappable; }
    static_cast<void>(cudaGetLastError());
  }

  std::unique_ptr<Transport> inner_;
  Sent& sent_;
};

}  // namespace

TEST_CASE("transport mpi is given memory that other processes can map") {
  const Communicator& comm = test::world();
  if (comm.min(visible_gpus().empty() ? 0 : 1) == 0) {
    test::skip("no GPU");
    return;
  }
  Config config;
  config.problem = {1, 1024, 2, 2, 64, DType::bf16, false, 1.0};  // dense: sent in place
  config.dtype = DType::bf16;
  config.backend = BackendKind::cuda;
  config.share_gpu = true;
  config.transport = TransportKind::mpi;
  Sent sent;
  const ResolvedConfig resolved = resolve(config, comm);
  {
    Session session(resolved, comm,
                    [&](std::unique_ptr<Transport> inner) { return std::make_unique<MappableSends>(std::move(inner), sent); });
    session.load();
    session.run();
  }
  CHECK(sent.messages > 0);
  CHECK(sent.mappable == sent.messages);
}
