// SPDX-License-Identifier: Apache-2.0
#include "p2p_transport.hpp"

#include <annulus/core/error.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus/transport/gpu_transports.hpp>

#include "device/cuda_access.hpp"
#include "gpu/cuda_driver.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>

namespace annulus {

namespace {

/// More lanes than a GPU has copy engines towards its peers would only take hardware queues from the attention.
constexpr std::int64_t kMostLanes = 4;

/// What a rank publishes of its receive ranges, followed by that many records of each kind.
struct PublishedHead {
  std::int64_t allocations = 0;
  std::int64_t ranges = 0;
};
struct PublishedAllocation {
  cudaIpcMemHandle_t handle{};
};
struct PublishedRange {
  std::int64_t step = 0;
  std::int64_t sender = 0;
  std::int64_t allocation = 0;
  std::int64_t offset_bytes = 0;
  std::int64_t bytes = 0;
};

template <class Record>
void append(std::string& text, std::span<const Record> records) {
  static_assert(std::is_trivially_copyable_v<Record>);
  if (!records.empty()) { text.append(reinterpret_cast<const char*>(records.data()), records.size_bytes()); }
}

template <class Record>
std::vector<Record> take(std::string_view& text, std::int64_t count) {
  static_assert(std::is_trivially_copyable_v<Record>);
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(Record);
  ANNULUS_ASSERT(text.size() >= bytes, "a rank published {} bytes where {} are needed", text.size(), bytes);
  std::vector<Record> records(static_cast<std::size_t>(count));
  if (bytes > 0) { std::memcpy(records.data(), text.data(), bytes); }
  text.remove_prefix(bytes);
  return records;
}

cudaIpcMemHandle_t handle_of(void* base) {
  cudaIpcMemHandle_t handle{};
  ANNULUS_CUDA(cudaIpcGetMemHandle(&handle, base));
  return handle;
}

/// Why this rank cannot push to all others, or empty.
std::string own_obstacle(const Communicator& comm, int own, const std::vector<std::string>& uuids) {
  if (comm.host_size() != comm.size()) {
    return fmt::format("transport p2p connects the ranks of one host; {} of {} ranks run on {}; transport nccl connects several hosts",
                       comm.host_size(), comm.size(), comm.host());
  }
  for (std::int64_t peer = 0; peer < comm.size(); ++peer) {
    const std::string& uuid = uuids[static_cast<std::size_t>(peer)];
    const int number = device_with_uuid(uuid);
    if (number < 0) {
      return fmt::format(
          "{} cannot see the GPU of rank {} ({}), so transport p2p cannot map its memory; let every rank see all GPUs of the host "
          "(CUDA_VISIBLE_DEVICES; under Slurm --gpus-per-node instead of --gpus-per-task)",
          comm.name(), comm.rank_in_job(peer), uuid);
    }
    if (number == own) { continue; }
    int possible = 0;
    ANNULUS_CUDA(cudaDeviceCanAccessPeer(&possible, own, number));
    if (possible == 0) {
      return fmt::format("the GPU of {} cannot access that of rank {} ({}); transports nccl and mpi can connect them", comm.name(),
                         comm.rank_in_job(peer), uuid);
    }
  }
  return {};
}

}  // namespace

std::string p2p_obstacle(const Communicator& comm, Device& device) {
  int number = 0;
  std::string uuid;
  together(comm, [&] {
    number = device_of(device);
    uuid = gpu_uuid(number);
  });
  const std::vector<std::string> uuids = comm.all_gather(uuid);
  std::string own;
  together(comm, [&] { own = own_obstacle(comm, number, uuids); });
  for (const std::string& obstacle : comm.all_gather(own)) {
    if (!obstacle.empty()) { return obstacle; }
  }
  return {};
}

IpcMapping::IpcMapping(const cudaIpcMemHandle_t& handle) {
  void* base = nullptr;
  ANNULUS_CUDA(cudaIpcOpenMemHandle(&base, handle, cudaIpcMemLazyEnablePeerAccess));
  base_ = static_cast<std::byte*>(base);
}

IpcMapping::~IpcMapping() {
  // Unmapping waits for the device, which may wait for a peer that is gone.
  if (base_ == nullptr || unwinding()) { return; }
  const cudaError_t status = cudaIpcCloseMemHandle(base_);
  if (status != cudaSuccess) { spdlog::error("cudaIpcCloseMemHandle failed: {}", cudaGetErrorString(status)); }
}

P2pTransport::DeviceWords::DeviceWords(std::int64_t count) {
  // CUDA shares whole blocks of 2 MiB, and small allocations lie together in one; this one has its own.
  constexpr std::size_t kBlockBytes = std::size_t{2} << 20;
  const std::size_t needed = static_cast<std::size_t>(count) * sizeof(std::uint32_t);
  const std::size_t bytes = (needed + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  void* data = nullptr;
  ANNULUS_CUDA(cudaMalloc(&data, bytes));
  data_ = static_cast<std::uint32_t*>(data);
  ANNULUS_CUDA(cudaMemset(data, 0, bytes));
  ANNULUS_CUDA(cudaDeviceSynchronize());
}

P2pTransport::DeviceWords::~DeviceWords() {
  // As with mappings: freeing waits for the device.
  if (!unwinding()) { static_cast<void>(cudaFree(data_)); }
}

P2pTransport::Streams::Streams(std::int64_t lane_count) {
  for (std::int64_t lane = 0; lane < lane_count; ++lane) { lanes.emplace_back(StreamPriority::high); }
}

P2pTransport::P2pTransport(const Communicator& comm, int number)
    : comm_(comm.duplicate()), number_(number), peers_(static_cast<std::size_t>(comm.size())) {
  // All that may fail on one rank alone is inside, so that no other waits for it in what follows.
  std::string own;
  together(comm_, [&] {
    static_cast<void>(CudaDriver::get());
    streams_ = std::make_unique<Streams>(std::clamp<std::int64_t>(comm_.size() - 1, 1, kMostLanes));
    ledger_ = std::make_unique<StepLedger>(comm_, "transfer by p2p", StepLedger::Counting::by_receipts);
    words_ = std::make_unique<DeviceWords>(2 * comm_.size());
    const PublishedAllocation published{handle_of(words_->get())};
    append(own, std::span(&published, 1));
  });
  const std::vector<std::string> all = comm_.all_gather(own);
  together(comm_, [&] {
    for (std::int64_t rank = 0; rank < comm_.size(); ++rank) {
      if (rank == comm_.rank()) { continue; }
      std::string_view text = all[static_cast<std::size_t>(rank)];
      const IpcMapping& mapping = word_mappings_.emplace_back(take<PublishedAllocation>(text, 1).front().handle);
      peers_[static_cast<std::size_t>(rank)].words = reinterpret_cast<std::uint32_t*>(mapping.get());
    }
  });
}

P2pTransport::~P2pTransport() {
  if (unwinding_.now()) { return; }
  try {
    const DeviceGuard guard(number_);
    ledger_->drain();
    mappings_.clear();
    word_mappings_.clear();
    // Memory must not be freed while a peer has it mapped.
    comm_.barrier();
  } catch (const std::exception& error) { comm_.abort(error.what()); }
}

void P2pTransport::release() {
  ledger_->drain();
  targets_.clear();
  mappings_.clear();
  comm_.barrier();
}

std::string P2pTransport::publish(std::span<const StepMessages> steps) const {
  std::map<std::byte*, std::int64_t> numbers;
  std::vector<PublishedAllocation> allocations;
  std::vector<PublishedRange> ranges;
  for (std::size_t step = 0; step < steps.size(); ++step) {
    for (const Incoming& message : steps[step].receives) {
      if (message.bytes == 0) { continue; }
      const CudaDriver::Range allocation = CudaDriver::get().allocation_of(message.data);
      const std::int64_t offset = message.data - allocation.base;
      ANNULUS_ASSERT(offset + message.bytes <= allocation.bytes, "a receive of step {} leaves its allocation", step);
      const auto [place, is_new] = numbers.try_emplace(allocation.base, std::ssize(allocations));
      if (is_new) { allocations.push_back({handle_of(allocation.base)}); }
      ranges.push_back({static_cast<std::int64_t>(step), message.peer, place->second, offset, message.bytes});
    }
  }
  const PublishedHead head{std::ssize(allocations), std::ssize(ranges)};
  std::string text;
  append(text, std::span(&head, 1));
  append<PublishedAllocation>(text, allocations);
  append<PublishedRange>(text, ranges);
  return text;
}

void P2pTransport::map_targets(std::span<const StepMessages> steps, const std::vector<std::string>& published) {
  for (std::int64_t peer = 0; peer < comm_.size(); ++peer) {
    if (peer == comm_.rank()) { continue; }
    std::string_view text = published[static_cast<std::size_t>(peer)];
    const PublishedHead head = take<PublishedHead>(text, 1).front();
    const auto allocations = take<PublishedAllocation>(text, head.allocations);
    const auto ranges = take<PublishedRange>(text, head.ranges);
    std::map<std::int64_t, std::byte*> bases;
    for (const PublishedRange& range : ranges) {
      if (range.sender != comm_.rank()) { continue; }
      const auto [base, is_new] = bases.try_emplace(range.allocation, nullptr);
      if (is_new) { base->second = mappings_.emplace_back(allocations[static_cast<std::size_t>(range.allocation)].handle).get(); }
      const bool unique = targets_.try_emplace({range.step, peer}, Target{base->second + range.offset_bytes, range.bytes}).second;
      ANNULUS_ASSERT(unique, "rank {} announces two receives from rank {} in step {}", peer, comm_.rank(), range.step);
    }
  }
  for (std::size_t step = 0; step < steps.size(); ++step) {
    for (const Outgoing& message : steps[step].sends) {
      if (message.bytes == 0) { continue; }
      const auto target = targets_.find({static_cast<std::int64_t>(step), message.peer});
      ANNULUS_ASSERT(target != targets_.end() && target->second.bytes == message.bytes,
                     "rank {} expects {} bytes of rank {} in step {}, which sends {}", message.peer,
                     target == targets_.end() ? 0 : target->second.bytes, comm_.rank(), step, message.bytes);
    }
  }
}

void P2pTransport::prepare(std::span<const StepMessages> steps) {
  const DeviceGuard guard(number_);
  release();
  std::string own;
  together(comm_, [&] { own = publish(steps); });
  const std::vector<std::string> all = comm_.all_gather(own);
  together(comm_, [&] { map_targets(steps, all); });
}

void P2pTransport::ready(std::int64_t step, Queue& queue) {
  const DeviceGuard guard(number_);
  ledger_->ready(step, stream_of(queue));
}

void P2pTransport::post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  const DeviceGuard guard(number_);
  StepLedger::Entry& entry = ledger_->open(step, sends, receives);
  if (entry.number == 0) { return; }
  const CudaDriver& driver = CudaDriver::get();
  const auto peer_of = [&](std::int64_t rank) -> Peer& { return peers_[static_cast<std::size_t>(rank)]; };
  const auto starts_when_ready = [&](const CudaStream& stream) {
    ANNULUS_CUDA(cudaStreamWaitEvent(stream.get(), entry.ready.passed(), cudaEventWaitDefault));
  };

  // All grants come before anything that waits for one: see the class comment.
  starts_when_ready(streams_->grants);
  for (const Incoming& message : receives) {
    if (message.bytes == 0) { continue; }
    Peer& peer = peer_of(message.peer);
    ++peer.received;
    driver.write_word(streams_->grants.get(), granted(peer.words, comm_.rank()), peer.received);
  }

  starts_when_ready(streams_->arrivals);
  for (const Outgoing& message : sends) {
    if (message.bytes == 0) { continue; }
    const auto target = targets_.find({step, message.peer});
    ANNULUS_ASSERT(target != targets_.end() && target->second.bytes == message.bytes,
                   "step {} sends {} bytes to rank {}, which were not announced", step, message.bytes, message.peer);
    Peer& peer = peer_of(message.peer);
    ++peer.sent;
    const CudaStream& copies = lane(message.peer);
    starts_when_ready(copies);
    driver.wait_for_word(copies.get(), granted(words_->get(), message.peer), peer.sent);
    ledger_->begin(entry, copies.get());
    ANNULUS_CUDA(
        cudaMemcpyAsync(target->second.data, message.data, checked_narrow<std::size_t>(message.bytes), cudaMemcpyDefault, copies.get()));
    driver.write_word(copies.get(), arrived(peer.words, comm_.rank()), peer.sent);
    ANNULUS_CUDA(cudaEventRecord(streams_->pushed.get(), copies.get()));
    ANNULUS_CUDA(cudaStreamWaitEvent(streams_->arrivals.get(), streams_->pushed.get(), cudaEventWaitDefault));
  }
  for (const Incoming& message : receives) {
    if (message.bytes == 0) { continue; }
    driver.wait_for_word(streams_->arrivals.get(), arrived(words_->get(), message.peer), peer_of(message.peer).received);
  }
  ledger_->complete(entry, streams_->arrivals.get());
}

void P2pTransport::wait(std::int64_t step, Queue& queue) {
  const DeviceGuard guard(number_);
  ledger_->mark_waiting(step, stream_of(queue));
  ledger_->wait(step, stream_of(queue));
}

StepTraffic P2pTransport::traffic(std::int64_t step) { return ledger_->traffic(step); }

std::unique_ptr<Transport> make_p2p_transport(const Communicator& comm, Device& device) {
  const std::string obstacle = p2p_obstacle(comm, device);
  ANNULUS_EXPECTS(obstacle.empty(), "{}", obstacle);
  const int number = device_of(device);
  const DeviceGuard guard(number);
  return std::make_unique<P2pTransport>(comm, number);
}

}  // namespace annulus
