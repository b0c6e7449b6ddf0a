// SPDX-License-Identifier: Apache-2.0
#include <annulus/transport/ring_rate.hpp>

#include <annulus/transport/make_transport.hpp>
#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <memory>
#include <utility>
#include <vector>

using namespace annulus;

namespace {

/// Passes everything on, and then spoils a byte of what rank 0 has received.
class SpoilingTransport final : public Transport {
 public:
  explicit SpoilingTransport(std::unique_ptr<Transport> inner) : inner_(std::move(inner)) {}
  TransportKind kind() const override { return inner_->kind(); }
  std::int64_t rank() const override { return inner_->rank(); }
  std::int64_t ranks() const override { return inner_->ranks(); }
  void ready(std::int64_t step, Queue& queue) override { inner_->ready(step, queue); }
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override {
    received_ = receives.front().data;
    inner_->post(step, sends, receives);
  }
  void wait(std::int64_t step, Queue& queue) override {
    inner_->wait(step, queue);
    if (rank() == 0) { received_[7] ^= std::byte{1}; }
  }
  StepTraffic traffic(std::int64_t step) override { return inner_->traffic(step); }

 private:
  std::unique_ptr<Transport> inner_;
  std::byte* received_ = nullptr;
};

}  // namespace

TEST_CASE("a ring that passes what it is given has rates and no wrong byte") {
  const Communicator& comm = test::world();
  const std::unique_ptr<Device> device = make_device({.kind = BackendKind::cpu, .threads = 1, .number = 0});
  const std::unique_ptr<Transport> transport = make_transport(TransportKind::mpi, comm, *device, false);

  const RingRate rate = measure_ring(comm, *device, *transport, 100001);

  CHECK(rate.bytes == 100001);
  CHECK(rate.wrong_bytes == 0);
  CHECK(rate.transport_gbs > 0);
  CHECK(rate.copy_gbs > 0);
  CHECK(comm.max(rate.transport_gbs) == rate.transport_gbs);
}

TEST_CASE("a byte that arrives spoiled on one rank is known to all") {
  const Communicator& comm = test::world();
  const std::unique_ptr<Device> device = make_device({.kind = BackendKind::cpu, .threads = 1, .number = 0});
  SpoilingTransport transport(make_transport(TransportKind::mpi, comm, *device, false));

  const RingRate rate = measure_ring(comm, *device, transport, 4096);

  CHECK(rate.wrong_bytes == 1);
}
