// SPDX-License-Identifier: Apache-2.0
// The transports between processes on GPU memory. Ranks share GPUs where there are fewer of them, so that one GPU is enough for every case.
#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>
#include <annulus/device/device.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/gpu/gpu_assignment.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/gpu_transports.hpp>
#include <annulus/transport/make_transport.hpp>
#include <annulus_test.hpp>

#include "device/cuda_access.hpp"
#include "gpu/cuda_handles.hpp"
#include "gpu_test_kernels.hpp"
#include "mpi_world.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <vector>

using namespace annulus;

namespace {

/// One message of a test, known to all ranks.
struct TestMessage {
  std::int64_t source = 0;
  std::int64_t target = 0;
  std::int64_t bytes = 0;
  std::int64_t send_offset = 0;     ///< in the source's send buffer of the step
  std::int64_t receive_offset = 0;  ///< in the target's slot of the step
};
using TestStep = std::vector<TestMessage>;

/// What the bytes of a message must be.
std::uint64_t pattern_of(std::int64_t run, std::int64_t step, const TestMessage& message) {
  return static_cast<std::uint64_t>(((run * 1000 + step) * 1000 + message.source) * 1000 + message.target);
}

bool fewer_gpus_than_ranks(const Communicator& comm) {
  const auto missing = comm.host_size() > std::ssize(visible_gpus()) ? std::int64_t{1} : std::int64_t{0};
  return comm.max(missing) == 1;
}

/// Steps whose messages have buffers of their own: enough to post two steps ahead.
constexpr std::int64_t kBuffers = 3;

/// A rank's GPU with send buffers and slots, as the executor has them.
class Gpu {
 public:
  explicit Gpu(const Communicator& comm) : comm_(comm), share_(fewer_gpus_than_ranks(comm)), device_(assign_gpu(comm, share_)) {
    static_cast<void>(cudaSetDevice(device_));
    backend = make_device({.kind = BackendKind::cuda, .threads = 1, .number = device_});
    queue = backend->make_queue();
    wrong_ = backend->allocate(sizeof(unsigned long long), MemoryUse::slot);
    REQUIRE(cudaMemset(wrong_.get(), 0, sizeof(unsigned long long)) == cudaSuccess);
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);  // the queue does not wait for the default stream
  }

  std::unique_ptr<Transport> transport(TransportKind kind) { return make_transport(kind, comm_, *backend, share_); }
  cudaStream_t stream() { return stream_of(*queue); }
  unsigned long long* wrong() const { return reinterpret_cast<unsigned long long*>(wrong_.get()); }
  unsigned long long wrong_so_far() {
    unsigned long long count = 0;
    backend->download(*queue, &count, wrong_.get(), sizeof(count));
    queue->synchronize();
    return count;
  }
  /// Buffers for the largest of the steps that share them.
  void allocate(const std::vector<TestStep>& steps) {
    for (std::size_t number = 0; number < kBuffers; ++number) {
      std::int64_t most_sent = 0;
      std::int64_t most_received = 0;
      for (std::size_t step = number; step < steps.size(); step += kBuffers) {
        for (const TestMessage& message : steps[step]) {
          if (message.source == comm_.rank()) { most_sent = std::max(most_sent, message.send_offset + message.bytes); }
          if (message.target == comm_.rank()) { most_received = std::max(most_received, message.receive_offset + message.bytes); }
        }
      }
      sends[number] = backend->allocate(most_sent, MemoryUse::slot);
      slots[number] = backend->allocate(most_received, MemoryUse::slot);
    }
  }
  StepMessages messages(std::int64_t step, const TestStep& all) const {
    const auto number = static_cast<std::size_t>(step % kBuffers);
    StepMessages own;
    for (const TestMessage& message : all) {
      if (message.source == comm_.rank()) {
        own.sends.push_back({message.target, sends[number].get() + message.send_offset, message.bytes});
      }
      if (message.target == comm_.rank()) {
        own.receives.push_back({message.source, slots[number].get() + message.receive_offset, message.bytes});
      }
    }
    return own;
  }

  std::unique_ptr<Device> backend;
  std::unique_ptr<Queue> queue;
  std::array<Buffer, kBuffers> sends;
  std::array<Buffer, kBuffers> slots;

 private:
  const Communicator& comm_;
  bool share_;
  int device_;
  Buffer wrong_;
};

/// The transports of this binary that can connect these ranks.
std::vector<TransportKind> transports_to_test() {
  std::vector<TransportKind> kinds{TransportKind::p2p, TransportKind::mpi};
  if (has_nccl_transport()) { kinds.push_back(TransportKind::nccl); }
  return kinds;
}

bool skip_without_gpu(const Communicator& comm) {
  if (comm.min(visible_gpus().empty() ? 0 : 1) == 1) { return false; }
  test::skip("no GPU");
  return true;
}

/// Random steps: several peers, odd sizes and places, steps without bytes. The same on all ranks.
std::vector<TestStep> random_steps(std::uint64_t seed, std::int64_t ranks, std::int64_t steps, std::int64_t most_bytes) {
  std::mt19937_64 random(seed);
  const auto below = [&](std::int64_t limit) { return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(limit)); };
  std::vector<TestStep> all(1);
  for (std::int64_t step = 1; step <= steps; ++step) {
    TestStep& messages = all.emplace_back();
    if (below(8) == 0) { continue; }
    std::vector<std::int64_t> sent(static_cast<std::size_t>(ranks));
    std::vector<std::int64_t> received(static_cast<std::size_t>(ranks));
    for (std::int64_t source = 0; source < ranks; ++source) {
      for (std::int64_t target = 0; target < ranks; ++target) {
        if (source == target || below(2) == 0) { continue; }
        constexpr std::array<std::int64_t, 6> kCorners{0, 1, 3, 4095, 4096, 65537};
        const std::int64_t bytes = below(3) == 0 ? kCorners[static_cast<std::size_t>(below(std::ssize(kCorners)))] : below(most_bytes);
        std::int64_t& send_end = sent[static_cast<std::size_t>(source)];
        std::int64_t& receive_end = received[static_cast<std::size_t>(target)];
        const TestMessage& message =
            messages.emplace_back(TestMessage{source, target, bytes, send_end + below(40), receive_end + below(40)});
        send_end = message.send_offset + bytes;
        receive_end = message.receive_offset + bytes;
      }
    }
  }
  return all;
}

/// Runs the steps as the executor does, everything enqueued at once, with work of random length around the messages, which are posted one
/// or two steps ahead.
void run_steps(Gpu& gpu, Transport& transport, const std::vector<TestStep>& steps, std::int64_t run, std::mt19937_64& random) {
  const std::int64_t ahead = 1 + run % 2;
  const auto last = std::ssize(steps) - 1;
  const auto post = [&](std::int64_t step) {
    if (step > last) { return; }
    const TestStep& all = steps[static_cast<std::size_t>(step)];
    for (const TestMessage& message : all) {
      if (message.source != transport.rank() || message.bytes == 0) { continue; }
      test::fill_pattern(gpu.stream(), gpu.sends[static_cast<std::size_t>(step % kBuffers)].get() + message.send_offset, message.bytes,
                         pattern_of(run, step, message));
    }
    const StepMessages own = gpu.messages(step, all);
    transport.ready(step, *gpu.queue);
    transport.post(step, own.sends, own.receives);
  };
  const auto work = [&](std::int64_t step) {
    if (random() % 3 == 0) { test::keep_busy(gpu.stream(), static_cast<std::int64_t>(random() % 300)); }
    for (const TestMessage& message : steps[static_cast<std::size_t>(step)]) {
      if (message.target != transport.rank() || message.bytes == 0) { continue; }
      test::count_wrong_bytes(gpu.stream(), gpu.slots[static_cast<std::size_t>(step % kBuffers)].get() + message.receive_offset,
                              message.bytes, pattern_of(run, step, message), gpu.wrong());
    }
  };
  for (std::int64_t step = 1; step <= ahead; ++step) { post(step); }
  work(0);
  for (std::int64_t step = 1; step <= last; ++step) {
    transport.wait(step, *gpu.queue);
    post(step + ahead);
    work(step);
  }
}

std::vector<StepMessages> announcement(const Gpu& gpu, const std::vector<TestStep>& steps) {
  std::vector<StepMessages> all;
  for (std::int64_t step = 0; step < std::ssize(steps); ++step) {
    all.push_back(gpu.messages(step, steps[static_cast<std::size_t>(step)]));
  }
  return all;
}

void check_counts(Transport& transport, const std::vector<TestStep>& steps) {
  for (std::int64_t step = 1; step < std::ssize(steps); ++step) {
    std::int64_t sent = 0;
    std::int64_t received = 0;
    for (const TestMessage& message : steps[static_cast<std::size_t>(step)]) {
      sent += message.source == transport.rank() ? message.bytes : 0;
      received += message.target == transport.rank() ? message.bytes : 0;
    }
    const StepTraffic traffic = transport.traffic(step);
    CHECK(traffic.bytes_sent == sent);
    CHECK(traffic.bytes_received == received);
    CHECK(traffic.communication_ms >= 0);
    CHECK((sent + received == 0 || traffic.end_ms >= traffic.begin_ms));
  }
}

}  // namespace

TEST_CASE("every byte of random GPU messages arrives, in 100 repetitions enqueued ahead of each other") {
  const TransportKind kind = GENERATE(from_range(transports_to_test()));
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  constexpr std::uint64_t kSeed = 20250117;
  INFO("transport " << to_string(kind) << ", seed " << kSeed);
  Gpu gpu(comm);
  const std::vector<TestStep> steps = random_steps(kSeed, comm.size(), 12, 300000);
  gpu.allocate(steps);
  const auto transport = gpu.transport(kind);
  transport->prepare(announcement(gpu, steps));
  std::mt19937_64 random(kSeed + static_cast<std::uint64_t>(comm.rank()));

  // Over sockets, as between ranks that share a GPU, a step of NCCL takes tens of milliseconds.
  const std::int64_t runs = kind == TransportKind::nccl ? 25 : 100;
  for (std::int64_t run = 0; run < runs; ++run) {
    run_steps(gpu, *transport, steps, run, random);
    if (run % 10 == 0) { check_counts(*transport, steps); }
  }

  CHECK(transport->kind() == kind);
  CHECK(gpu.wrong_so_far() == 0);
  check_counts(*transport, steps);
  transport->prepare({});
}

TEST_CASE("a transport serves one plan after another, and memory is free in between") {
  const TransportKind kind = GENERATE(from_range(transports_to_test()));
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  Gpu gpu(comm);
  const auto transport = gpu.transport(kind);
  std::mt19937_64 random(static_cast<std::uint64_t>(comm.rank()));

  for (std::uint64_t plan = 0; plan < 6; ++plan) {
    INFO("transport " << to_string(kind) << ", seed " << plan);
    const std::vector<TestStep> steps = random_steps(plan, comm.size(), 1 + static_cast<std::int64_t>(plan), plan % 2 == 0 ? 100 : 3000000);
    gpu.allocate(steps);
    transport->prepare(announcement(gpu, steps));
    for (std::int64_t run = 0; run < 2; ++run) { run_steps(gpu, *transport, steps, run, random); }
    CHECK(gpu.wrong_so_far() == 0);
    check_counts(*transport, steps);
    transport->prepare({});
  }
}

TEST_CASE("blocks that pass from slot to slot around the ring stay what they were") {
  const TransportKind kind = GENERATE(from_range(transports_to_test()));
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  INFO("transport " << to_string(kind));
  constexpr std::int64_t kBytes = 1234567;
  Gpu gpu(comm);
  Buffer resident = gpu.backend->allocate(kBytes, MemoryUse::tensor);
  for (Buffer& slot : gpu.slots) { slot = gpu.backend->allocate(kBytes, MemoryUse::slot); }
  const std::int64_t next = (comm.rank() + 1) % comm.size();
  const std::int64_t previous = (comm.rank() + comm.size() - 1) % comm.size();
  std::vector<StepMessages> steps(1);
  for (std::int64_t step = 1; step < comm.size(); ++step) {
    const std::byte* source = step == 1 ? resident.get() : gpu.slots[static_cast<std::size_t>((step - 1) % 2)].get();
    steps.push_back({{{next, source, kBytes}}, {{previous, gpu.slots[static_cast<std::size_t>(step % 2)].get(), kBytes}}});
  }
  const auto transport = gpu.transport(kind);
  transport->prepare(steps);
  const auto post = [&](std::int64_t step) {
    if (step >= comm.size()) { return; }
    const StepMessages& own = steps[static_cast<std::size_t>(step)];
    transport->ready(step, *gpu.queue);
    transport->post(step, own.sends, own.receives);
  };

  for (std::uint64_t run = 0; run < 20; ++run) {
    test::fill_pattern(gpu.stream(), resident.get(), kBytes, run * 100 + static_cast<std::uint64_t>(comm.rank()));
    post(1);
    for (std::int64_t step = 1; step < comm.size(); ++step) {
      transport->wait(step, *gpu.queue);
      post(step + 1);
      if ((static_cast<std::int64_t>(run) + step + comm.rank()) % 3 == 0) { test::keep_busy(gpu.stream(), 500); }
      const std::int64_t owner = (comm.rank() + comm.size() - step) % comm.size();
      test::count_wrong_bytes(gpu.stream(), gpu.slots[static_cast<std::size_t>(step % 2)].get(), kBytes,
                              run * 100 + static_cast<std::uint64_t>(owner), gpu.wrong());
    }
  }

  CHECK(gpu.wrong_so_far() == 0);
  transport->prepare({});
}

TEST_CASE("a message of more than 2 GiB arrives whole") {
  const TransportKind kind = GENERATE(from_range(transports_to_test()));
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  constexpr std::int64_t kBytes = (std::int64_t{1} << 31) + 4099;
  Gpu gpu(comm);
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  REQUIRE(cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess);
  if (comm.min(static_cast<std::int64_t>(free_bytes)) < 3 * kBytes) {
    test::skip("too little GPU memory");
    return;
  }
  INFO("transport " << to_string(kind));
  const std::vector<TestStep> steps{{}, {TestMessage{0, 1, kBytes, 0, 0}}};
  gpu.allocate(steps);
  const auto transport = gpu.transport(kind);
  transport->prepare(announcement(gpu, steps));
  std::mt19937_64 random(1);

  run_steps(gpu, *transport, steps, 0, random);

  CHECK(gpu.wrong_so_far() == 0);
  check_counts(*transport, steps);
  transport->prepare({});
}

TEST_CASE("the copies of the next step start before the work of this step ends") {
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  constexpr std::int64_t kBytes = std::int64_t{4} << 20;
  constexpr std::int64_t kWorkMicroseconds = 40000;
  constexpr std::int64_t kSteps = 6;
  Gpu gpu(comm);
  std::vector<TestStep> steps(1);
  for (std::int64_t step = 1; step <= kSteps; ++step) {
    TestStep& messages = steps.emplace_back();
    for (std::int64_t rank = 0; rank < comm.size(); ++rank) { messages.push_back({rank, (rank + 1) % comm.size(), kBytes, 0, 0}); }
  }
  gpu.allocate(steps);
  const auto transport = gpu.transport(TransportKind::p2p);
  transport->prepare(announcement(gpu, steps));
  std::vector<std::unique_ptr<Event>> work_ends;
  const auto post = [&](std::int64_t step) {
    if (step > kSteps) { return; }
    const StepMessages own = gpu.messages(step, steps[static_cast<std::size_t>(step)]);
    transport->ready(step, *gpu.queue);
    transport->post(step, own.sends, own.receives);
  };
  const auto work = [&] {
    test::keep_busy(gpu.stream(), kWorkMicroseconds);
    work_ends.push_back(gpu.backend->record(*gpu.queue));
  };

  comm.barrier();
  const std::unique_ptr<Event> origin = gpu.backend->record(*gpu.queue);
  post(1);
  work();
  for (std::int64_t step = 1; step <= kSteps; ++step) {
    transport->wait(step, *gpu.queue);
    post(step + 1);
    work();
  }
  gpu.queue->synchronize();

  for (std::int64_t step = 0; step < kSteps; ++step) {
    const double work_end_ms = work_ends[static_cast<std::size_t>(step)]->ms_since(*origin);
    const StepTraffic next = transport->traffic(step + 1);
    INFO("step " << step << " works until " << work_end_ms << " ms, the copy of step " << step + 1 << " runs from " << next.begin_ms
                 << " to " << next.end_ms);
    CHECK(next.begin_ms < work_end_ms);
  }
  transport->prepare({});
}

TEST_CASE("automatic takes p2p where ranks reach each other's GPU memory") {
  const Communicator& comm = test::world();
  if (skip_without_gpu(comm)) { return; }
  Gpu gpu(comm);

  const bool reachable = p2p_obstacle(comm, *gpu.backend).empty();
  const TransportKind chosen = choose_gpu_transport(comm, *gpu.backend);

  CHECK((chosen == TransportKind::p2p) == reachable);
  CHECK((reachable || chosen == (has_nccl_transport() ? TransportKind::nccl : TransportKind::mpi)));
}
