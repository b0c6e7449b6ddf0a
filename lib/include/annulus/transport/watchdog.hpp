// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mpi.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

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

  /// Marks the lifetime of a wait. Nested waits count as the outer one.
  class Wait {
   public:
    Wait(Watchdog* owner, void (Watchdog::*end)()) : owner_(owner), end_(end) {}
    Wait(Wait&& other) noexcept : owner_(std::exchange(other.owner_, nullptr)), end_(other.end_) {}
    Wait& operator=(Wait&&) = delete;
    Wait(const Wait&) = delete;
    Wait& operator=(const Wait&) = delete;
    ~Wait() {
      if (owner_ != nullptr) { (owner_->*end_)(); }
    }

   private:
    Watchdog* owner_;
    void (Watchdog::*end_)();
  };

  /// This rank now waits for a peer (-1: for all of them). `operation` must be a string with static lifetime.
  [[nodiscard]] Wait waiting(const char* operation, std::int64_t peer = -1, std::int64_t bytes = 0);
  /// While it lasts, transfers with peers are open though this rank may be computing: a host can stand inside a call to a device that
  /// itself stands behind a peer, and then cannot say that it waits. Peers that still answer are never blamed for it.
  [[nodiscard]] Wait exposed();
  /// Something arrived or was finished: the clock starts again.
  void progress() { progress_.fetch_add(1, std::memory_order_relaxed); }
  /// The ring step this rank is in, for messages; -1: outside the ring.
  void set_step(std::int64_t step) { step_.store(step, std::memory_order_relaxed); }

  /// "step 3, waiting for rank 2 (8192 bytes): " or what else is known, for the head of a message.
  std::string describe() const;

 private:
  struct Thread;
  void end_wait();
  void end_exposed();

  std::atomic<std::uint64_t> progress_{0};
  std::atomic<std::int64_t> step_{-1};
  std::atomic<std::int64_t> peer_{-1};
  std::atomic<std::int64_t> bytes_{0};
  std::atomic<const char*> operation_{nullptr};  ///< what is waited for; null: not waiting
  std::atomic<int> depth_{0};                    ///< nested waits
  std::atomic<int> exposed_{0};                  ///< holders of exposed()
  std::unique_ptr<Thread> thread_;
};

}  // namespace annulus
