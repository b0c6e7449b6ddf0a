// SPDX-License-Identifier: Apache-2.0
// A ring whose transport misbehaves on one rank at one step: fault_program RANK STEP FAULT TIMEOUT OUTPUT, started by scripts/launch.
// Faults: none, throw, kill, stop, lose (a message that is never sent), stop-unseen (a stop that the others compute through, their
// transfers open), slow (all ranks compute for several timeouts, their transfers open).
#include <annulus/core/error.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/session/result_sink.hpp>
#include <annulus/session/session.hpp>
#include <annulus/transport/gpu_transports.hpp>

#include <fmt/format.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <string>
#include <thread>
#include <unistd.h>

namespace {

using namespace annulus;

struct Fault {
  std::int64_t rank = -1;
  std::int64_t step = -1;
  std::string kind;
};

class FaultyTransport final : public Transport {
 public:
  FaultyTransport(std::unique_ptr<Transport> inner, Fault fault, Watchdog& watchdog)
      : inner_(std::move(inner)), fault_(std::move(fault)), watchdog_(watchdog) {}
  TransportKind kind() const override { return inner_->kind(); }
  std::int64_t rank() const override { return inner_->rank(); }
  std::int64_t ranks() const override { return inner_->ranks(); }
  bool takes_multiprocessors() const override { return inner_->takes_multiprocessors(); }
  void prepare(std::span<const StepMessages> steps) override { inner_->prepare(steps); }
  void ready(std::int64_t step, Queue& queue) override { inner_->ready(step, queue); }
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override {
    if (step == fault_.step && (fault_.kind == "slow" || (fault_.kind == "stop-unseen" && rank() != fault_.rank))) {
      const Watchdog::Wait open = watchdog_.exposed();
      std::this_thread::sleep_for(fault_.kind == "slow" ? std::chrono::seconds(4) : std::chrono::seconds(60));
    }
    if (rank() == fault_.rank && step == fault_.step) {
      const auto now = std::chrono::system_clock::now().time_since_epoch();
      fmt::print(stderr, "fault at {}\n", std::chrono::duration_cast<std::chrono::milliseconds>(now).count());
      if (fault_.kind == "throw") { throw RuntimeFailure(fmt::format("step {}: an injected failure", step)); }
      if (fault_.kind == "kill") { std::raise(SIGKILL); }
      if (fault_.kind == "stop" || fault_.kind == "stop-unseen") { std::raise(SIGSTOP); }
      if (fault_.kind == "lose") { sends = {}; }
    }
    inner_->post(step, sends, receives);
  }
  void wait(std::int64_t step, Queue& queue) override { inner_->wait(step, queue); }
  StepTraffic traffic(std::int64_t step) override { return inner_->traffic(step); }

 private:
  std::unique_ptr<Transport> inner_;
  Fault fault_;
  Watchdog& watchdog_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) { return 64; }
  std::signal(SIGTERM, [](int) {  // how the launcher ends the ranks that are left; as annulus does
    remove_unfinished_results();
    ::_exit(128 + SIGTERM);
  });
  prepare_gpu_connections();
  prepare_gpu_sharing();
  MpiEnvironment mpi(&argc, &argv);
  const Communicator comm = Communicator::world(std::atof(argv[4]));
  const Fault fault{std::atoll(argv[1]), std::atoll(argv[2]), argv[3]};
  Config config;
  config.problem = {1, 4096, 2, 2, 32, DType::fp32, false, 0.2};
  config.pattern = dense_pattern(4096);
  config.threads = 1;
  config.output = argv[5];
  if (argc > 6) { config.backend = *from_string<BackendKind>(argv[6]); }
  if (argc > 7) { config.transport = *from_string<TransportKind>(argv[7]); }
  config.share_gpu = config.backend == BackendKind::cuda;
  try {
    const ResolvedConfig resolved = resolve(config, comm);
    const std::unique_ptr<ResultFile> file = create_result(resolved, comm);
    Session session(resolved, comm, [&](std::unique_ptr<Transport> inner) {
      return std::make_unique<FaultyTransport>(std::move(inner), fault, comm.watchdog());
    });
    session.load();
    // Several rings, so that a fault may also meet ranks that are a whole ring ahead.
    for (int i = 0; i < 3; ++i) { session.run(); }
    write_result(session, file.get(), gather_timings(comm, session.local_timings()), count_rows(session), {{"test", "fault"}});
  } catch (const AgreedError& error) {
    if (error.reporter()) { fmt::print(stderr, "annulus: {}\n", error.what()); }
    return static_cast<int>(error.code());
  }
  return 0;
}
