// SPDX-License-Identifier: Apache-2.0
#include "nccl_transport.hpp"

#include <annulus/core/error.hpp>
#include <annulus/gpu/gpu_assignment.hpp>
#include <annulus/transport/gpu_transports.hpp>

#include "device/cuda_access.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <source_location>
#include <string>
#include <string_view>
#include <thread>
#include <unistd.h>
#include <vector>

namespace annulus {

namespace {

void check_nccl(ncclResult_t result, ncclComm_t comm, const char* call, std::source_location where = std::source_location::current()) {
  if (result == ncclSuccess) { return; }
  const char* detail = ncclGetLastError(comm);
  throw RuntimeFailure(fmt::format("{} failed at {}:{}: {}{}{}", call, where.file_name(), where.line(), ncclGetErrorString(result),
                                   detail != nullptr && *detail != '\0' ? ": " : "", detail != nullptr ? detail : ""));
}
#define ANNULUS_NCCL(comm, call) check_nccl((call), (comm), #call)

/// Closes the group on every way out, since an open one would swallow NCCL's next calls.
class Group {
 public:
  explicit Group(ncclComm_t comm) : comm_(comm) { ANNULUS_NCCL(comm_, ncclGroupStart()); }
  ~Group() {
    if (open_) { static_cast<void>(ncclGroupEnd()); }
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  void end() {
    open_ = false;
    ANNULUS_NCCL(comm_, ncclGroupEnd());
  }

 private:
  ncclComm_t comm_;
  bool open_ = true;
};

/// NCCL takes two ranks of one host on one GPU for a mistake. Since 2.30 a switch allows it; before, ranks that claim hosts of their own
/// are not compared. @returns the variable that says so
const char* sharing_variable() {
  int version = 0;
  ANNULUS_NCCL(nullptr, ncclGetVersion(&version));
  return version >= NCCL_VERSION(2, 30, 0) ? "NCCL_MULTI_RANK_GPU_ENABLE" : "NCCL_HOSTID";
}

/// Sets a variable that NCCL reads unless the user has.
void set_default(const char* name, const std::string& value) {
  if (setenv(name, value.c_str(), 0) != 0) { throw RuntimeFailure(fmt::format("cannot set {} in the environment", name)); }
}

/// The number at the start of an environment variable; 0 if there is none.
std::int64_t number_in(const char* variable) {
  const char* text = std::getenv(variable);
  return text == nullptr ? 0 : std::strtoll(text, nullptr, 10);
}

/// Ranks that the launcher has started on this host; 0 if it does not say.
std::int64_t ranks_on_this_host() {
  for (const char* name : {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"}) {
    if (const std::int64_t ranks = number_in(name); ranks > 0) { return ranks; }
  }
  return 0;
}

}  // namespace

NcclCommunicator::NcclCommunicator(const Communicator& comm) : comm_(comm.share()) {
  ncclUniqueId id{};
  together(comm_, [&] {
    if (comm_.rank() == 0) { ANNULUS_NCCL(nullptr, ncclGetUniqueId(&id)); }
  });
  comm_.broadcast(std::as_writable_bytes(std::span(&id, 1)), 0);
  // A blocking start is enough: the watchdog's thread ends a start that some rank never joins, and a communicator made without blocking
  // would pay for a thread in every group.
  const Watchdog::Wait wait = comm_.waiting("NCCL start-up");
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ANNULUS_NCCL(nullptr,
               ncclCommInitRankConfig(&handle_, checked_narrow<int>(comm_.size()), id, checked_narrow<int>(comm_.rank()), &config));
}

NcclCommunicator::~NcclCommunicator() {
  if (handle_ == nullptr) { return; }
  const Watchdog::Wait wait = comm_.waiting("NCCL shut-down");
  const ncclResult_t result = unwinding_.now() ? ncclCommAbort(handle_) : ncclCommDestroy(handle_);
  if (result != ncclSuccess) { spdlog::error("{}: NCCL shut-down failed: {}", comm_.name(), ncclGetErrorString(result)); }
}

void NcclCommunicator::check_asynchronous() const {
  ncclResult_t state = ncclSuccess;
  ANNULUS_NCCL(handle_, ncclCommGetAsyncError(handle_, &state));
  if (state != ncclSuccess && state != ncclInProgress) { check_nccl(state, handle_, "a transfer by NCCL"); }
}

NcclTransport::NcclTransport(const Communicator& comm, Device& device, int number, bool share_gpu)
    : comm_(comm.share()), device_(device), number_(number) {
  // What may fail on one rank alone comes before NCCL's start, in which the others would wait for it.
  together(comm_, [&] {
    stream_ = std::make_unique<CudaStream>(StreamPriority::high);
    ledger_ =
        std::make_unique<StepLedger>(comm_, "transfer by NCCL", StepLedger::Counting::by_receipts, [this] { nccl_->check_asynchronous(); });
  });
  const bool shared = share_gpu && comm_.max(ranks_on_gpu(comm_, number)) > 1;
  together(comm_, [&] {
    if (shared && std::getenv(sharing_variable()) == nullptr) {
      throw RuntimeFailure(
          fmt::format("ranks share a GPU, and {} was not set for NCCL when this process started; set it", sharing_variable()));
    }
  });
  nccl_ = std::make_unique<NcclCommunicator>(comm_);
}

NcclTransport::~NcclTransport() {
  if (unwinding_.now()) { return; }
  try {
    ledger_->drain();
  } catch (const std::exception& error) { comm_.abort(error.what()); }
}

void NcclTransport::prepare(std::span<const StepMessages> steps) {
  if (steps.empty()) { return; }
  const DeviceGuard guard(number_);
  std::set<std::int64_t> to;
  std::set<std::int64_t> from;
  for (const StepMessages& step : steps) {
    for (const Outgoing& message : step.sends) {
      if (message.bytes > 0 && !connected_to_.contains(message.peer)) { to.insert(message.peer); }
    }
    for (const Incoming& message : step.receives) {
      if (message.bytes > 0 && !connected_from_.contains(message.peer)) { from.insert(message.peer); }
    }
  }
  const auto landing_bytes = static_cast<std::int64_t>(from.size());
  Buffer bytes;
  together(comm_, [&] { bytes = device_.allocate(landing_bytes + 1, MemoryUse::slot); });
  if (to.empty() && from.empty()) { return; }

  // The messages of a plan have two ends, so these first ones have too. One byte connects all channels of a pair.
  Group group(nccl_->get());
  for (const std::int64_t peer : to) {
    ANNULUS_NCCL(nccl_->get(),
                 ncclSend(bytes.get() + landing_bytes, 1, ncclUint8, checked_narrow<int>(peer), nccl_->get(), stream_->get()));
  }
  std::byte* landing = bytes.get();
  for (const std::int64_t peer : from) {
    ANNULUS_NCCL(nccl_->get(), ncclRecv(landing++, 1, ncclUint8, checked_narrow<int>(peer), nccl_->get(), stream_->get()));
  }
  const Watchdog::Wait wait = comm_.waiting("connecting by NCCL");
  group.end();
  while (!is_idle(stream_->get())) {
    nccl_->check_asynchronous();
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  connected_to_.merge(to);
  connected_from_.merge(from);
}

void NcclTransport::ready(std::int64_t step, Queue& queue) {
  const DeviceGuard guard(number_);
  ledger_->ready(step, stream_of(queue));
}

void NcclTransport::post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  const DeviceGuard guard(number_);
  StepLedger::Entry& entry = ledger_->open(step, sends, receives);
  if (entry.number == 0) { return; }
  ANNULUS_CUDA(cudaStreamWaitEvent(stream_->get(), entry.ready.passed(), cudaEventWaitDefault));
  ledger_->begin(entry, stream_->get());
  Group group(nccl_->get());
  for (const Outgoing& message : sends) {
    if (message.bytes == 0) { continue; }
    ANNULUS_NCCL(nccl_->get(), ncclSend(message.data, checked_narrow<std::size_t>(message.bytes), ncclUint8,
                                        checked_narrow<int>(message.peer), nccl_->get(), stream_->get()));
  }
  for (const Incoming& message : receives) {
    if (message.bytes == 0) { continue; }
    ANNULUS_NCCL(nccl_->get(), ncclRecv(message.data, checked_narrow<std::size_t>(message.bytes), ncclUint8,
                                        checked_narrow<int>(message.peer), nccl_->get(), stream_->get()));
  }
  group.end();
  ledger_->complete(entry, stream_->get());
}

void NcclTransport::wait(std::int64_t step, Queue& queue) {
  const DeviceGuard guard(number_);
  ledger_->mark_waiting(step, stream_of(queue));
  ledger_->wait(step, stream_of(queue));
}

StepTraffic NcclTransport::traffic(std::int64_t step) { return ledger_->traffic(step); }

std::unique_ptr<Transport> make_nccl_transport(const Communicator& comm, Device& device, bool share_gpu) {
  int number = 0;
  together(comm, [&] { number = device_of(device); });
  const DeviceGuard guard(number);
  return std::make_unique<NcclTransport>(comm, device, number, share_gpu);
}

bool has_nccl_transport() { return true; }

void prepare_gpu_sharing() {
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return;
  }
  // Enough for a GPU each. A single one may be each rank's own or everybody's, and nobody can be asked yet: then what was asked for is
  // meant.
  const std::int64_t ranks = ranks_on_this_host();
  if (ranks > 0 && gpus >= ranks) { return; }
  if (std::string_view(sharing_variable()) == "NCCL_HOSTID") {
    std::array<char, 256> host{};
    static_cast<void>(gethostname(host.data(), host.size() - 1));
    // Containers may have one name and equal process ids, but no two processes the same moment as well.
    set_default("NCCL_HOSTID", fmt::format("{}-{}-{}", host.data(), getpid(), std::chrono::steady_clock::now().time_since_epoch().count()));
    if (ranks > 0 && ranks == number_in("OMPI_COMM_WORLD_SIZE")) { set_default("NCCL_SOCKET_IFNAME", "lo"); }
  } else {
    set_default("NCCL_MULTI_RANK_GPU_ENABLE", "1");
  }
}

}  // namespace annulus
