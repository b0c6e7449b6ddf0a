// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mpi.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace annulus {

/// Ends the job when a rank waits for a peer without progress for too long.
///
/// A thread per rank, on a communicator of its own, answers the other watchdogs. When this rank has depended on others for nearly
/// `timeout_s` without progress, it asks all of them: a rank that does not answer within a grace period of 3 s is named and the lowest rank
/// that does answer aborts the job with exit code 3. If all answer, the job goes on while no rank waits or some rank is computing (and
/// still moving), and is aborted as stuck otherwise. A rank depends on others while it waits for one, and while it computes with transfers
/// open; that it computes never counts against it.
class Watchdog {
 public:
  /// Never fires.
  Watchdog();
  /// `abort` is called on the watchdog's thread with one sentence and must not return. Collective over `comm`, which it duplicates.
  Watchdog(MPI_Comm comm, double timeout_s, std::string host, std::function<void(std::string_view)> abort);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Marks the lifetime of a wait. Waits of several threads, or nested ones, may end in any order; the oldest stands for them all.
  class Wait {
   public:
    Wait(Watchdog* owner, std::uint64_t number) : owner_(owner), number_(number) {}
    Wait(Wait&& other) noexcept : owner_(std::exchange(other.owner_, nullptr)), number_(other.number_) {}
    Wait& operator=(Wait&&) = delete;
    Wait(const Wait&) = delete;
    Wait& operator=(const Wait&) = delete;
    ~Wait() {
      if (owner_ != nullptr) { owner_->end(number_); }
    }

   private:
    Watchdog* owner_;
    std::uint64_t number_;
  };

  /// This rank now waits for a peer (-1: for all of them), in the ring step `step` (-1: the one it is in). `operation` must be a string
  /// with static lifetime.
  [[nodiscard]] Wait waiting(const char* operation, std::int64_t peer = -1, std::int64_t bytes = 0, std::int64_t step = -1);
  /// While it lasts, transfers with peers are open though this rank may be computing: a host can stand inside a call to a device that
  /// itself stands behind a peer, and then cannot say that it waits. Peers that still answer are never blamed for it.
  [[nodiscard]] Wait exposed();
  /// Something arrived or was finished: the clock starts again. Long work of the rank's own says so every second or so; without it the
  /// others take ten timeouts of it for a hang.
  void progress() { progress_.fetch_add(1, std::memory_order_relaxed); }
  /// For work that knows no watchdog: adding to it is progress. Lives as long as the watchdog.
  std::atomic<std::uint64_t>& progress_counter() { return progress_; }
  /// The ring step this rank is in, for messages; -1: outside the ring.
  void set_step(std::int64_t step) { step_.store(step, std::memory_order_relaxed); }

  /// "step 3, waiting for rank 2 (8192 bytes): " or what else is known, for the head of a message.
  std::string describe() const;

 private:
  struct Thread;
  struct Waited {
    std::uint64_t number = 0;
    const char* operation = nullptr;
    std::int64_t peer = -1;
    std::int64_t bytes = 0;
    std::int64_t step = -1;
  };
  void end(std::uint64_t number);
  /// The oldest wait; one without an operation if there is none.
  Waited oldest_wait() const;

  std::atomic<std::uint64_t> progress_{0};
  std::atomic<std::int64_t> step_{-1};
  std::atomic<int> exposed_{0};  ///< holders of exposed()
  mutable std::mutex mutex_;     ///< of what follows
  std::vector<Waited> waits_;    ///< by age
  std::uint64_t next_ = 1;
  std::unique_ptr<Thread> thread_;
};

}  // namespace annulus
