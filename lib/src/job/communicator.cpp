// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/communicator.hpp>

#include <annulus/core/at_abort.hpp>
#include <annulus/core/build_info.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus/job/greeting.hpp>

#include "job/message_chunks.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <thread>
#include <unistd.h>

namespace annulus {

namespace {

std::string host_name() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0) { return "unknown host"; }
  return name.data();
}

/// Communicators whose owners were destroyed while unwinding. If all ranks had agreed on what was thrown they can still be freed, by all of
/// them in this order, before MPI ends.
std::vector<MPI_Comm>& left_behind() {
  static std::vector<MPI_Comm> handles;
  return handles;
}

}  // namespace

void check_mpi(int status, const char* call, std::source_location where) {
  if (status == MPI_SUCCESS) { return; }
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(status, text.data(), &length);
  throw RuntimeFailure(fmt::format("{} failed at {}:{}: {}", call, where.file_name(), where.line(), std::string(text.data(), length)));
}

namespace {

/// No start of a job is given less than this, however short its timeout: a loaded machine takes seconds to start its processes.
constexpr double kStartSeconds = 20.0;

/// Ends the process if MPI_Init, which waits for every other process of the job, does not return: some of them may never call it.
class StartGuard {
 public:
  StartGuard(double timeout_s, const std::function<std::optional<std::string>()>& obstacle)
      : thread_([this, timeout_s, obstacle](const std::stop_token& stop) { watch(stop, timeout_s, obstacle); }) {}

 private:
  void watch(const std::stop_token& stop, double timeout_s, const std::function<std::optional<std::string>()>& obstacle) {
    constexpr auto kPoll = std::chrono::milliseconds(100);
    const auto start = std::chrono::steady_clock::now();
    std::unique_lock lock(mutex_);
    while (!ended_.wait_for(lock, stop, kPoll, [] { return false; }) && !stop.stop_requested()) {
      if (obstacle) {
        if (const std::optional<std::string> found = obstacle()) { end(ExitCode::bad_input, *found); }
      }
      const double limit = std::max(timeout_s, kStartSeconds);
      if (timeout_s > 0 && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > limit) {
        end(ExitCode::runtime_failure,
            fmt::format("MPI_Init has not returned within {:g} s: a process of this job has not started, or does not enter MPI", limit));
      }
    }
  }

  [[noreturn]] static void end(ExitCode code, const std::string& message) {
    fmt::print(stderr, "annulus: {}: {}\n", host_name(), message);
    std::fflush(stderr);
    std::_Exit(static_cast<int>(code));
  }

  std::mutex mutex_;
  std::condition_variable_any ended_;
  std::jthread thread_;  ///< last: it uses the others
};

/// Every rank's greeting. Nothing may come before this exchange: another version might answer something else.
std::vector<Greeting> exchange_greetings(int size, double timeout_s) {
  const BuildInfo& build = build_info();
  const Greeting own = greeting_of(build.version, build.git);
  std::vector<Greeting> all(size);
  constexpr int kBytes = sizeof(Greeting);
  constexpr const char* kAdvice = "a rank runs another program, or an annulus of another version";
  try {
    MPI_Request request = MPI_REQUEST_NULL;
    ANNULUS_MPI(MPI_Iallgather(own.data(), kBytes, MPI_CHAR, all.data(), kBytes, MPI_CHAR, MPI_COMM_WORLD, &request));
    const auto start = std::chrono::steady_clock::now();
    const double limit = std::max(timeout_s, kStartSeconds);
    for (int done = 0; done == 0;) {
      ANNULUS_MPI(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
      if (done != 0) { break; }
      if (timeout_s > 0 && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > limit) {
        throw RuntimeFailure(fmt::format("not every rank has answered within {:g} s", limit));
      }
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  } catch (const RuntimeFailure& error) { throw RuntimeFailure(fmt::format("the first exchange failed: {}; {}", error.what(), kAdvice)); }
  return all;
}

}  // namespace

MpiEnvironment::MpiEnvironment(int* argc, char*** argv, double timeout_s, const std::function<std::optional<std::string>()>& obstacle) {
  int provided = 0;
  {
    const StartGuard guard(timeout_s, obstacle);
    ANNULUS_MPI(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided));
  }
  ANNULUS_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
  if (provided < MPI_THREAD_MULTIPLE) {
    throw RuntimeFailure("this MPI library does not provide MPI_THREAD_MULTIPLE, which the watchdog needs");
  }
}

MpiEnvironment::~MpiEnvironment() {
  if (unwinding_.now()) { return; }
  for (MPI_Comm& handle : left_behind()) { MPI_Comm_free(&handle); }
  MPI_Finalize();
}

void MpiEnvironment::require_one_version(double timeout_s) const {
  int rank = 0;
  int size = 1;
  ANNULUS_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
  ANNULUS_MPI(MPI_Comm_size(MPI_COMM_WORLD, &size));
  if (size == 1) { return; }
  if (const auto difference = difference_of(exchange_greetings(size, timeout_s))) {
    throw AgreedError(ExitCode::bad_input, *difference, rank == 0);
  }
}

std::string MpiEnvironment::from_rank_0(std::string text) const {
  auto length = static_cast<std::int64_t>(text.size());
  ANNULUS_MPI(MPI_Bcast(&length, 1, MPI_INT64_T, 0, MPI_COMM_WORLD));
  text.resize(length);
  ANNULUS_MPI(MPI_Bcast(text.data(), checked_narrow<int>(length), MPI_CHAR, 0, MPI_COMM_WORLD));
  return text;
}

Communicator Communicator::single() {
  Communicator comm;
  comm.watchdog_ = std::make_shared<Watchdog>();
  comm.host_ = host_name();
  return comm;
}

Communicator Communicator::world(double timeout_s) {
  Communicator comm;
  comm.host_ = host_name();
  comm.comm_ = std::make_shared<MPI_Comm>(MPI_COMM_WORLD);
  comm.find_ranks();
  if (comm.size_ == 1) {
    comm.watchdog_ = std::make_shared<Watchdog>();
    return comm;
  }
  const std::string name = comm.name();
  comm.watchdog_ = std::make_shared<Watchdog>(MPI_COMM_WORLD, timeout_s, comm.host_, [name](std::string_view message) {
    print_error(fmt::format("{}: {}; the job is aborted", name, message));
    run_abort_hooks();
    MPI_Abort(MPI_COMM_WORLD, static_cast<int>(ExitCode::runtime_failure));
    std::_Exit(static_cast<int>(ExitCode::runtime_failure));
  });
  return comm;
}

void Communicator::find_ranks() {
  int rank = 0;
  int size = 1;
  ANNULUS_MPI(MPI_Comm_rank(get(), &rank));
  ANNULUS_MPI(MPI_Comm_size(get(), &size));
  rank_ = rank;
  size_ = size;
  host_rank_ = 0;
  host_size_ = 1;
  host_ranks_ = {rank_};
  if (size == 1) { return; }
  MPI_Comm host_comm = MPI_COMM_NULL;
  ANNULUS_MPI(MPI_Comm_split_type(get(), MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &host_comm));
  ANNULUS_MPI(MPI_Comm_rank(host_comm, &rank));
  ANNULUS_MPI(MPI_Comm_size(host_comm, &size));
  host_ranks_.resize(size);
  ANNULUS_MPI(MPI_Allgather(&rank_, 1, MPI_INT64_T, host_ranks_.data(), 1, MPI_INT64_T, host_comm));
  ANNULUS_MPI(MPI_Comm_free(&host_comm));
  host_rank_ = rank;
  host_size_ = size;
}

std::string Communicator::name() const { return fmt::format("rank {} ({})", rank_in_job(rank_), host_); }

MPI_Comm Communicator::get() const {
  ANNULUS_ASSERT(comm_ != nullptr, "a communicator without MPI has no handle");
  return *comm_;
}

Communicator Communicator::duplicate() const {
  Communicator copy = *this;
  if (comm_) {
    MPI_Comm handle = MPI_COMM_NULL;
    const Watchdog::Wait wait = waiting("duplicating a communicator");
    ANNULUS_MPI(MPI_Comm_dup(get(), &handle));
    copy.adopt(handle);
  }
  return copy;
}

Communicator Communicator::split(std::int64_t part) const {
  Communicator some = *this;
  if (!comm_) { return some; }
  const Watchdog::Wait wait = waiting("splitting a communicator");
  MPI_Comm handle = MPI_COMM_NULL;
  ANNULUS_MPI(MPI_Comm_split(get(), checked_narrow<int>(part), checked_narrow<int>(rank_), &handle));
  some.adopt(handle);
  some.find_ranks();
  const std::int64_t in_job = rank_in_job(rank_);
  some.job_ranks_.resize(static_cast<std::size_t>(some.size_));
  ANNULUS_MPI(MPI_Allgather(&in_job, 1, MPI_INT64_T, some.job_ranks_.data(), 1, MPI_INT64_T, handle));
  return some;
}

void Communicator::adopt(MPI_Comm handle) {
  comm_ = std::shared_ptr<MPI_Comm>(new MPI_Comm(handle), [](MPI_Comm* owned) {
    // Freeing is collective: not while unwinding, when peers may be gone.
    if (unwinding()) {
      left_behind().push_back(*owned);
    } else {
      MPI_Comm_free(owned);
    }
    delete owned;
  });
}

void Communicator::barrier() const {
  if (size_ == 1) { return; }
  const Watchdog::Wait wait = waiting("barrier");
  ANNULUS_MPI(MPI_Barrier(get()));
}

void Communicator::broadcast(std::span<std::byte> data, std::int64_t root) const {
  if (size_ == 1) { return; }
  const Watchdog::Wait wait = waiting("broadcast", root, static_cast<std::int64_t>(data.size()));
  ANNULUS_MPI(MPI_Bcast(data.data(), checked_narrow<int>(data.size()), MPI_BYTE, checked_narrow<int>(root), get()));
}

std::string Communicator::broadcast(std::string text, std::int64_t root) const {
  auto length = static_cast<std::int64_t>(text.size());
  broadcast(std::as_writable_bytes(std::span(&length, 1)), root);
  text.resize(length);
  broadcast(std::as_writable_bytes(std::span(text)), root);
  return text;
}

namespace {

template <class Number>
Number all_reduce(const Communicator& comm, Number value, MPI_Datatype type, MPI_Op operation) {
  if (comm.size() == 1) { return value; }
  const Watchdog::Wait wait = comm.waiting("agreement of all ranks");
  Number result{};
  ANNULUS_MPI(MPI_Allreduce(&value, &result, 1, type, operation, comm.get()));
  return result;
}

}  // namespace

std::int64_t Communicator::sum(std::int64_t value) const { return all_reduce(*this, value, MPI_INT64_T, MPI_SUM); }
double Communicator::sum(double value) const { return all_reduce(*this, value, MPI_DOUBLE, MPI_SUM); }
double Communicator::max(double value) const { return all_reduce(*this, value, MPI_DOUBLE, MPI_MAX); }
std::int64_t Communicator::max(std::int64_t value) const { return all_reduce(*this, value, MPI_INT64_T, MPI_MAX); }
std::int64_t Communicator::min(std::int64_t value) const { return all_reduce(*this, value, MPI_INT64_T, MPI_MIN); }

std::vector<std::string> Communicator::all_gather(const std::string& bytes) const {
  if (size_ == 1) { return {bytes}; }
  const Watchdog::Wait wait = waiting("gathering from all ranks");
  std::vector<int> counts(size_);
  const int own = checked_narrow<int>(bytes.size());
  ANNULUS_MPI(MPI_Allgather(&own, 1, MPI_INT, counts.data(), 1, MPI_INT, get()));
  std::vector<int> offsets(counts.size(), 0);
  std::exclusive_scan(counts.begin(), counts.end(), offsets.begin(), 0);
  std::string all(std::size_t{0} + offsets.back() + counts.back(), '\0');
  ANNULUS_MPI(MPI_Allgatherv(bytes.data(), own, MPI_CHAR, all.data(), counts.data(), offsets.data(), MPI_CHAR, get()));
  std::vector<std::string> parts;
  for (std::size_t rank = 0; rank < counts.size(); ++rank) { parts.push_back(all.substr(offsets[rank], counts[rank])); }
  return parts;
}

std::vector<std::string> Communicator::gather(const std::string& bytes, std::int64_t root) const {
  std::vector<std::string> parts(rank_ == root ? size_ : 0);
  if (rank_ != root) {
    const auto length = static_cast<std::int64_t>(bytes.size());
    send(std::as_bytes(std::span(&length, 1)), root, 1);
    send(std::as_bytes(std::span(bytes)), root, 2);
    return parts;
  }
  for (std::int64_t peer = 0; peer < size_; ++peer) {
    std::string& part = parts[peer];
    if (peer == rank_) {
      part = bytes;
      continue;
    }
    std::int64_t length = 0;
    receive(std::as_writable_bytes(std::span(&length, 1)), peer, 1);
    part.resize(length);
    receive(std::as_writable_bytes(std::span(part)), peer, 2);
  }
  return parts;
}

void Communicator::send(std::span<const std::byte> data, std::int64_t peer, int tag) const {
  const auto bytes = static_cast<std::int64_t>(data.size());
  const Watchdog::Wait wait = waiting("sending", peer, bytes);
  for_each_message_chunk(bytes, [&](std::int64_t offset, int count) {
    ANNULUS_MPI(MPI_Send(data.data() + offset, count, MPI_BYTE, checked_narrow<int>(peer), tag, get()));
    watchdog_->progress();
  });
}

void Communicator::receive(std::span<std::byte> data, std::int64_t peer, int tag) const {
  const auto bytes = static_cast<std::int64_t>(data.size());
  const Watchdog::Wait wait = waiting("receiving", peer, bytes);
  for_each_message_chunk(bytes, [&](std::int64_t offset, int count) {
    ANNULUS_MPI(MPI_Recv(data.data() + offset, count, MPI_BYTE, checked_narrow<int>(peer), tag, get(), MPI_STATUS_IGNORE));
    watchdog_->progress();
  });
}

namespace {

/// Parts of all ranks, which are moved a piece of each at a time: MPI-3 counts and displacements are int.
class Pieces {
 public:
  Pieces(std::span<const std::int64_t> parts, std::int64_t piece) : parts_(parts), piece_(piece) {}

  /// Makes room for the next piece of every part.
  void next() {
    ++turn_;
    counts_.clear();
    places_.clear();
    int sum = 0;
    for (const std::int64_t part : parts_) {
      counts_.push_back(checked_narrow<int>(std::clamp<std::int64_t>(part - turn_ * piece_, 0, piece_)));
      places_.push_back(sum);
      sum += counts_.back();
    }
    buffer_.resize(sum);
  }

  /// Calls copy(place among all parts, buffer, bytes) for the pieces.
  template <class Copy>
  void for_each(Copy&& copy) {
    std::int64_t part_begin = 0;
    for (std::size_t rank = 0; rank < parts_.size(); ++rank) {
      const auto bytes = static_cast<std::size_t>(counts_[rank]);
      if (bytes > 0) { copy(part_begin + turn_ * piece_, buffer_.data() + places_[rank], bytes); }
      part_begin += parts_[rank];
    }
  }

  std::byte* data() { return buffer_.data(); }
  const int* counts() const { return counts_.data(); }
  const int* places() const { return places_.data(); }
  std::int64_t bytes() const { return static_cast<std::int64_t>(buffer_.size()); }

 private:
  std::span<const std::int64_t> parts_;
  std::int64_t piece_;
  std::int64_t turn_ = -1;
  std::vector<int> counts_;
  std::vector<int> places_;
  std::vector<std::byte> buffer_;
};

}  // namespace

FromAll Communicator::all_to_all(std::span<const std::byte> data, std::span<const std::int64_t> bytes, std::int64_t most_bytes) const {
  ANNULUS_EXPECTS(static_cast<std::int64_t>(bytes.size()) == size_, "{} parts for {} ranks", bytes.size(), size_);
  ANNULUS_EXPECTS(std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0}) == static_cast<std::int64_t>(data.size()),
                  "the parts for {} ranks are not the {} bytes that there are", size_, data.size());
  if (size_ == 1) { return {{data.begin(), data.end()}, {bytes.begin(), bytes.end()}}; }
  FromAll from;
  from.bytes.resize(bytes.size());
  {
    const Watchdog::Wait wait = waiting("the sizes of an all-to-all");
    ANNULUS_MPI(MPI_Alltoall(bytes.data(), 1, MPI_INT64_T, from.bytes.data(), 1, MPI_INT64_T, get()));
  }
  from.data.resize(std::accumulate(from.bytes.begin(), from.bytes.end(), std::int64_t{0}));
  const std::int64_t piece = std::max<std::int64_t>(1, most_bytes / size_);
  const std::int64_t turns = max((*std::max_element(bytes.begin(), bytes.end()) + piece - 1) / piece);
  Pieces outgoing(bytes, piece);
  Pieces incoming(from.bytes, piece);
  for (std::int64_t turn = 0; turn < turns; ++turn) {
    outgoing.next();
    incoming.next();
    outgoing.for_each([&](std::int64_t place, std::byte* buffer, std::size_t count) { std::memcpy(buffer, data.data() + place, count); });
    const Watchdog::Wait wait = waiting("an all-to-all", -1, outgoing.bytes());
    ANNULUS_MPI(MPI_Alltoallv(outgoing.data(), outgoing.counts(), outgoing.places(), MPI_BYTE, incoming.data(), incoming.counts(),
                              incoming.places(), MPI_BYTE, get()));
    incoming.for_each(
        [&](std::int64_t place, std::byte* buffer, std::size_t count) { std::memcpy(from.data.data() + place, buffer, count); });
    watchdog_->progress();
  }
  return from;
}

void Communicator::agree(const std::exception_ptr& failure) const {
  if (size_ == 1) {
    if (failure) { std::rethrow_exception(failure); }
    return;
  }
  const std::int64_t failed = min(failure ? rank_ : size_);
  if (failed == size_) { return; }
  auto code = static_cast<std::int64_t>(ExitCode::runtime_failure);
  std::string message;
  if (failed == rank_) {
    try {
      std::rethrow_exception(failure);
    } catch (const Error& error) {
      code = static_cast<std::int64_t>(error.code());
      message = error.what();
    } catch (const std::exception& error) { message = error.what(); }
  }
  broadcast(std::as_writable_bytes(std::span(&code, 1)), failed);
  message = broadcast(std::move(message), failed);
  throw AgreedError(static_cast<ExitCode>(code), message, failed == rank_);
}

void Communicator::abort(std::string_view message) const {
  print_error(fmt::format("{}: {}", name(), message));
  run_abort_hooks();
  if (comm_) { MPI_Abort(MPI_COMM_WORLD, static_cast<int>(ExitCode::runtime_failure)); }
  std::_Exit(static_cast<int>(ExitCode::runtime_failure));
}

}  // namespace annulus
