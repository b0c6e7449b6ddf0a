// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/unwinding.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include "gpu/cuda_handles.hpp"
#include "step_ledger.hpp"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

/// Device memory of another process, mapped here.
class IpcMapping {
 public:
  explicit IpcMapping(const cudaIpcMemHandle_t& handle);
  IpcMapping(IpcMapping&& other) noexcept : base_(std::exchange(other.base_, nullptr)) {}
  IpcMapping& operator=(IpcMapping&&) = delete;
  IpcMapping(const IpcMapping&) = delete;
  IpcMapping& operator=(const IpcMapping&) = delete;
  ~IpcMapping();
  std::byte* get() const { return base_; }

 private:
  std::byte* base_ = nullptr;
};

/// The sender's copy engine writes into the receiver's slot, then a word that says so; no multiprocessor takes part.
///
/// Every ordered pair of ranks has two words that count its messages: `granted`, in the sender's memory, written by the receiver when the
/// range of the next message may be overwritten, and `arrived`, in the receiver's memory, written by the sender behind the data. Both only
/// grow, over all runs and plans. Everything that a stream waits for comes earlier in the order (step, grant, copy, arrival) on some rank,
/// and every rank enqueues in this order, so no cycle can form even if the hardware runs several streams one after the other.
class P2pTransport final : public Transport {
 public:
  /// `device` must be current.
  P2pTransport(const Communicator& comm, int number);
  ~P2pTransport() override;

  TransportKind kind() const override { return TransportKind::p2p; }
  std::int64_t rank() const override { return comm_.rank(); }
  std::int64_t ranks() const override { return comm_.size(); }
  void prepare(std::span<const StepMessages> steps) override;
  void ready(std::int64_t step, Queue& queue) override;
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override;
  void wait(std::int64_t step, Queue& queue) override;
  StepTraffic traffic(std::int64_t step) override;

 private:
  /// Counters that peers write and streams wait for; zero at first.
  class DeviceWords {
   public:
    explicit DeviceWords(std::int64_t count);
    ~DeviceWords();
    DeviceWords(const DeviceWords&) = delete;
    DeviceWords& operator=(const DeviceWords&) = delete;
    std::uint32_t* get() const { return data_; }

   private:
    std::uint32_t* data_ = nullptr;
  };
  /// What a rank keeps about another one.
  struct Peer {
    std::uint32_t* words = nullptr;  ///< its words, mapped; null for this rank itself
    std::uint32_t sent = 0;
    std::uint32_t received = 0;
  };
  /// High priority, all of them.
  struct Streams {
    explicit Streams(std::int64_t lane_count);
    CudaStream grants{StreamPriority::high};
    CudaStream arrivals{StreamPriority::high};
    std::vector<CudaStream> lanes;  ///< copies; a peer always has the same one
    CudaEvent pushed{cudaEventDisableTiming};
  };
  /// Step and peer of a message.
  using MessageKey = std::pair<std::int64_t, std::int64_t>;
  struct Target {
    std::byte* data = nullptr;
    std::int64_t bytes = 0;
  };

  std::string publish(std::span<const StepMessages> steps) const;
  void map_targets(std::span<const StepMessages> steps, const std::vector<std::string>& published);
  std::uint32_t* arrived(std::uint32_t* words, std::int64_t sender) const { return words + sender; }
  std::uint32_t* granted(std::uint32_t* words, std::int64_t receiver) const { return words + comm_.size() + receiver; }
  const CudaStream& lane(std::int64_t peer) const { return streams_->lanes[static_cast<std::size_t>(peer) % streams_->lanes.size()]; }
  void release();

  Communicator comm_;
  int number_;
  Unwinding unwinding_;
  std::unique_ptr<DeviceWords> words_;  ///< arrived[ranks], granted[ranks]
  std::vector<Peer> peers_;
  std::vector<IpcMapping> word_mappings_;
  std::vector<IpcMapping> mappings_;  ///< the peers' memory of the announced plan
  std::map<MessageKey, Target> targets_;
  std::unique_ptr<Streams> streams_;
  std::unique_ptr<StepLedger> ledger_;
};

}  // namespace annulus
