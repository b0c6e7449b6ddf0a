// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/error.hpp>
#include <annulus/core/list.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus/job/watchdog.hpp>

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <source_location>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace annulus {

/// Throws RuntimeFailure with the call, MPI's text and the place unless `status` is MPI_SUCCESS.
void check_mpi(int status, const char* call, std::source_location where = std::source_location::current());
#define ANNULUS_MPI(call) ::annulus::check_mpi((call), #call)

/// Initialises MPI (MPI_THREAD_MULTIPLE, MPI_ERRORS_RETURN) and finalises it; at most one per process.
class MpiEnvironment {
 public:
  /// Ends the process with a sentence if the other processes of the job do not enter MPI too: after `timeout_s` (0: never; never less than
  /// 20 s), or as soon as `obstacle`, which is asked ten times a second on another thread, has a reason.
  MpiEnvironment(int* argc, char*** argv, double timeout_s = 0, const std::function<std::optional<std::string>()>& obstacle = {});
  /// Finalises, except while unwinding or when a failure is on its way: then peers may be gone and finalising could hang.
  ~MpiEnvironment();
  MpiEnvironment(const MpiEnvironment&) = delete;
  MpiEnvironment& operator=(const MpiEnvironment&) = delete;

  /// Requires that all processes of the job run the same version of this program, which must come before any other message: another version
  /// might answer something else. Collective.
  /// @throws AgreedError if they do not, RuntimeFailure if some do not answer within `timeout_s` (0: never; never less than 20 s)
  void require_one_version(double timeout_s) const;

  /// Rank 0's `text` on every rank: for what must be known before there is a communicator with its watchdog. Collective.
  std::string from_rank_0(std::string text) const;

 private:
  Unwinding unwinding_;
};

/// What an all-to-all brought: bytes[r] bytes of rank r, in rank order in `data`.
struct FromAll {
  std::vector<std::byte> data;
  std::vector<std::int64_t> bytes;
};

/// The processes of a job, for start-up and host scalars. Every collective counts as waiting for the watchdog. One process without MPI is
/// a communicator of size 1 on which everything is local. Not copied: share() and duplicate() say which of the two is meant.
class Communicator {
 public:
  /// One process; never touches MPI.
  static Communicator single();
  /// All processes of the job, with a watchdog of `timeout_s` seconds (0: none). Collective.
  static Communicator world(double timeout_s);
  Communicator(Communicator&&) = default;
  Communicator& operator=(Communicator&&) = default;

  std::int64_t rank() const { return rank_; }
  std::int64_t size() const { return size_; }
  /// The rank in the whole job of one of these ranks; negative numbers stay as they are.
  std::int64_t rank_in_job(std::int64_t rank) const { return job_ranks_.empty() || rank < 0 ? rank : job_ranks_[rank]; }
  const std::string& host() const { return host_; }
  /// "rank 3 (gpu07)", by the rank in the job.
  std::string name() const;
  /// Position among, and number of, the ranks of this host.
  std::int64_t host_rank() const { return host_rank_; }
  std::int64_t host_size() const { return host_size_; }
  /// The ranks of this host, by their position among them.
  const std::vector<std::int64_t>& host_ranks() const { return host_ranks_; }
  MPI_Comm get() const;
  Watchdog& watchdog() const { return *watchdog_; }
  /// As Watchdog::waiting(), for one of these ranks.
  [[nodiscard]] Watchdog::Wait waiting(const char* operation, std::int64_t peer = -1, std::int64_t bytes = 0,
                                       std::int64_t step = -1) const {
    return watchdog_->waiting(operation, rank_in_job(peer), bytes, step);
  }

  /// A communicator over the same processes with its own message space, sharing the watchdog. Collective.
  Communicator duplicate() const;
  /// A communicator of those ranks that give the same `part`, in their order; it shares the watchdog. Collective.
  Communicator split(std::int64_t part) const;
  /// The same communicator for another owner: same message space, freed with the last of them.
  Communicator share() const { return *this; }

  void barrier() const;
  void broadcast(std::span<std::byte> data, std::int64_t root) const;
  std::string broadcast(std::string text, std::int64_t root) const;
  std::int64_t sum(std::int64_t value) const;
  double sum(double value) const;
  double max(double value) const;
  std::int64_t max(std::int64_t value) const;
  std::int64_t min(std::int64_t value) const;
  /// Every rank's bytes, by rank; empty vectors on the others than root.
  std::vector<std::string> gather(const std::string& bytes, std::int64_t root) const;
  std::vector<std::string> all_gather(const std::string& bytes) const;

  /// Blocking, any size (split below 2 GiB); `tag` separates streams.
  void send(std::span<const std::byte> data, std::int64_t peer, int tag) const;
  void receive(std::span<std::byte> data, std::int64_t peer, int tag) const;

  /// Sends bytes[r] bytes of `data`, which lie in rank order, to every rank r. Any size: one call of MPI moves `most_bytes` from a rank, or
  /// a byte to each other, and takes as many. Collective.
  FromAll all_to_all(std::span<const std::byte> data, std::span<const std::int64_t> bytes, std::int64_t most_bytes = kAllToAllBytes) const;
  static constexpr std::int64_t kAllToAllBytes = std::int64_t{1} << 28;

  /// Agrees on a failure before anything is sent: if any rank passes an exception, every rank throws; the lowest failing rank's message and
  /// code win, and `reporter` tells the one rank that should print it. Collective.
  void agree(const std::exception_ptr& failure) const;

  /// Logs one line with rank and host, removes unfinished results, ends the whole job with exit code 3.
  [[noreturn]] void abort(std::string_view message) const;

 private:
  Communicator() = default;
  Communicator(const Communicator&) = default;
  Communicator& operator=(const Communicator&) = default;
  /// Owns a handle.
  void adopt(MPI_Comm handle);
  /// Finds rank, size and the ranks of this host from the handle.
  void find_ranks();
  std::shared_ptr<MPI_Comm> comm_;  ///< empty: no MPI
  std::shared_ptr<Watchdog> watchdog_;
  std::string host_;
  std::int64_t rank_ = 0;
  std::int64_t size_ = 1;
  std::int64_t host_rank_ = 0;
  std::int64_t host_size_ = 1;
  std::vector<std::int64_t> host_ranks_{0};
  List<std::int64_t> job_ranks_;  ///< by rank; empty: the same
};

/// An error that every rank knows of and one rank prints.
class AgreedError : public Error {
 public:
  AgreedError(ExitCode code, const std::string& message, bool reporter) : Error(code, message), reporter_(reporter) {}
  bool reporter() const noexcept { return reporter_; }

 private:
  bool reporter_;
};

/// Runs `body`, which any rank may fail on its own, and agrees on the outcome. Collective.
template <class Body>
void together(const Communicator& comm, Body&& body) {
  std::exception_ptr failure;
  try {
    std::forward<Body>(body)();
  } catch (...) { failure = std::current_exception(); }
  comm.agree(failure);
}

/// Runs `body` with messages in flight. An exception cannot be thrown across ranks there: it is logged with rank, host and what the
/// watchdog knows of step and peer, and ends the job. Owners belong outside of `body`: what it owns itself is destroyed before. Alone, the
/// exception is thrown on, and so is what all ranks have agreed on.
template <class Body>
void fail_fast(const Communicator& comm, Body&& body) {
  try {
    std::forward<Body>(body)();
  } catch (const AgreedError&) { throw; } catch (const std::exception& error) {
    if (comm.size() == 1) { throw; }
    comm.abort(comm.watchdog().describe() + error.what());
  } catch (...) {
    if (comm.size() == 1) { throw; }
    comm.abort(comm.watchdog().describe() + "an exception of an unknown type");
  }
}

}  // namespace annulus
