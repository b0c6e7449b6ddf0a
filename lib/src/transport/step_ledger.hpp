// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/unwinding.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include "gpu/cuda_clock.hpp"
#include "receipts.hpp"

#include <cuda_runtime.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace annulus {

/// The transfers of a GPU transport, step by step: when they could start, when they were done, and whether somebody waits for them.
///
/// A host that enqueues far ahead may stand inside a launch when a peer stops, and a runtime call of another thread may stand behind it. So
/// the clocks behind the streams write into pinned words how far they are, and a thread reads these without asking the CUDA runtime: it
/// tells the watchdog that transfers are open, and when the queue stands before one that has not come (the rank's own work is not waiting),
/// counts completed transfers as progress, and calls `check`. Steps without bytes cost nothing and touch no stream. Functions that take
/// streams need their device to be current.
class StepLedger {
 public:
  /// One step's transfer; lives as long as the ledger and is used again by the next run of the same step.
  struct Entry {
    std::int64_t step = 0;
    std::uint32_t number = 0;  ///< of the transfer, counted over all steps and runs; 0: nothing to transfer
    std::int64_t bytes_sent = 0;
    std::int64_t bytes_received = 0;  ///< noted by a transport that counts them itself, before complete()
    CudaMoment ready;                 ///< on the queue, when it could start
    std::vector<CudaMoment> begins;   ///< on the streams that move the data
    std::size_t begins_used = 0;
    CudaMoment done;
  };

  /// Who counts the bytes that come: the transport, or the ledger from what the senders say.
  enum class Counting { by_transport, by_receipts };

  /// `operation` has static lifetime and names a wait in messages; `check` looks for asynchronous errors and throws, and runs on the
  /// ledger's thread while transfers are open. What it throws ends the job (with a single rank, the host's next wait throws it).
  StepLedger(const Communicator& comm, const char* operation, Counting counting, std::function<void()> check = {});
  /// Does not wait for transfers; see drain().
  ~StepLedger();
  StepLedger(const StepLedger&) = delete;
  StepLedger& operator=(const StepLedger&) = delete;

  /// The data of a step, and the place for what it receives, are there once `queue` has done what it holds now.
  void ready(std::int64_t step, cudaStream_t queue);
  /// Opens the transfer of a step that is ready.
  Entry& open(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives);
  /// From here on `stream` moves data of the step.
  void begin(Entry& entry, cudaStream_t stream);
  /// Here `stream` has seen all of the step's data come and go.
  void complete(Entry& entry, cudaStream_t stream);
  /// Marks that `queue` now comes to wait for the step; the caller makes it wait.
  void mark_waiting(std::int64_t step, cudaStream_t queue);
  /// Makes what is enqueued on `queue` from now on wait for the completed step.
  void wait(std::int64_t step, cudaStream_t queue);

  Entry& entry(std::int64_t step);
  /// Of a step that was waited for. Blocks until it is done.
  /// @throws RuntimeFailure if the device or `check` failed
  StepTraffic traffic(std::int64_t step);
  /// Blocks until every open transfer is done.
  void drain();

 private:
  /// Written by streams, read by the host. The lines are apart, for two writers.
  struct Words {
    alignas(64) std::uint32_t completed = 0;
    alignas(64) std::uint32_t waiting = 0;
  };
  struct Open {
    std::uint32_t number = 0;
    std::int64_t step = 0;
    std::int64_t peer = -1;
    std::int64_t bytes = 0;
  };
  CudaClock& clock_of(cudaStream_t stream);
  void await(const Entry& entry);
  void watch();
  void settle();
  static std::uint32_t read(std::uint32_t& word);

  Communicator comm_;
  const char* operation_;
  Counting counting_;
  Receipts receipts_{comm_};
  std::function<void()> check_;
  Unwinding unwinding_;
  Words* words_ = nullptr;     ///< pinned
  std::deque<Entry> entries_;  ///< by step; a deque keeps them in place
  CudaMoment origin_;          ///< when step 1 was last ready
  std::uint32_t next_ = 1;

  std::mutex mutex_;  ///< of what follows
  std::condition_variable changed_;
  std::deque<Open> open_;
  bool stop_ = false;
  std::exception_ptr failure_;
  std::map<cudaStream_t, CudaClock> clocks_;  ///< each used by the thread that has the stream

  std::thread thread_;
};

}  // namespace annulus
