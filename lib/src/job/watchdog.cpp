// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/watchdog.hpp>

#include <annulus/core/error.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus/job/communicator.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

namespace annulus {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPoll = std::chrono::milliseconds(20);
/// How long a rank may take to answer; its watchdog is a thread of its own, so only a stopped process or a dead host takes longer.
constexpr double kGraceSeconds = 3.0;
/// What a launcher may take to end all processes.
constexpr double kEndSeconds = 2.0;
/// A rank that computes without visible progress is given this many timeouts before it counts as hung.
constexpr int kComputePatience = 10;
constexpr std::size_t kHostChars = 64;

enum Tag : int { kAsk = 1, kAnswer = 2, kAborting = 3 };

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// What one rank says of itself.
struct Answer {
  std::int64_t round = 0;
  std::int64_t waiting = 0;
  std::int64_t step = -1;
  std::int64_t peer = -1;
  std::int64_t progress = 0;
};
constexpr int kAnswerWords = sizeof(Answer) / sizeof(std::int64_t);

std::string in_step(std::int64_t step) { return step >= 0 ? fmt::format("step {}: ", step) : std::string(); }

}  // namespace

struct Watchdog::Thread {
  Thread(Watchdog& watched, MPI_Comm parent, double timeout, std::string own_host, std::function<void(std::string_view)> abort_job)
      : owner(watched), timeout_s(timeout), abort(std::move(abort_job)) {
    ANNULUS_MPI(MPI_Comm_dup(parent, &comm));
    ANNULUS_MPI(MPI_Comm_rank(comm, &rank));
    ANNULUS_MPI(MPI_Comm_size(comm, &size));
    own_host.resize(kHostChars, '\0');
    std::string all(kHostChars * static_cast<std::size_t>(size), '\0');
    ANNULUS_MPI(
        MPI_Allgather(own_host.data(), static_cast<int>(kHostChars), MPI_CHAR, all.data(), static_cast<int>(kHostChars), MPI_CHAR, comm));
    for (int peer = 0; peer < size; ++peer) { hosts.emplace_back(all.c_str() + kHostChars * static_cast<std::size_t>(peer)); }
    answers.resize(static_cast<std::size_t>(size));
    last_answers.resize(static_cast<std::size_t>(size));
    thread = std::jthread([this](std::stop_token token) {
      stop = std::move(token);
      run();
    });
  }

  void run() {
    try {
      while (!stop.stop_requested()) {
        serve();
        watch();
        std::this_thread::sleep_for(kPoll);
      }
    } catch (const std::exception& error) { abort(error.what()); }
  }

  /// Answers whoever asks, notes answers and announced aborts.
  void serve() {
    std::erase_if(in_flight, [](auto& send) {
      int done = 0;
      ANNULUS_MPI(MPI_Test(&send->second, &done, MPI_STATUS_IGNORE));
      return done != 0;
    });
    while (true) {
      int found = 0;
      MPI_Status status;
      ANNULUS_MPI(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm, &found, &status));
      if (found == 0) { return; }
      Answer message;
      ANNULUS_MPI(MPI_Recv(&message, kAnswerWords, MPI_INT64_T, status.MPI_SOURCE, status.MPI_TAG, comm, MPI_STATUS_IGNORE));
      if (status.MPI_TAG == kAsk) {
        Answer own = self();
        own.round = message.round;
        send(status.MPI_SOURCE, kAnswer, own);
      } else if (status.MPI_TAG == kAnswer) {
        if (message.round == round) { answers[static_cast<std::size_t>(status.MPI_SOURCE)] = message; }
      } else {
        abort_announced = Clock::now();
      }
    }
  }

  Answer self() const {
    const Waited wait = owner.oldest_wait();
    return {round, wait.operation != nullptr ? 1 : 0, wait.step, wait.peer, static_cast<std::int64_t>(owner.progress_.load())};
  }

  void send(int peer, Tag tag, const Answer& message) {
    auto& entry = in_flight.emplace_back(std::make_unique<std::pair<Answer, MPI_Request>>(message, MPI_REQUEST_NULL));
    ANNULUS_MPI(MPI_Isend(&entry->first, kAnswerWords, MPI_INT64_T, peer, tag, comm, &entry->second));
  }

  /// Measures how long this rank has depended on others without progress, and asks them when that is too long.
  void watch() {
    const std::uint64_t progress = owner.progress_.load();
    const bool depends = owner.oldest_wait().operation != nullptr || owner.exposed_.load() > 0;
    if (!depends || progress != seen_progress) {
      seen_progress = progress;
      quiet_since = Clock::now();
      return;
    }
    if (timeout_s <= 0 || seconds_since(quiet_since) < patience_s) { return; }
    if (abort_announced && seconds_since(*abort_announced) < 10.0) { return; }
    interrogate();
    quiet_since = Clock::now();
  }

  /// Sends every rank a question and collects what comes back within the grace period.
  void ask_all() {
    ++round;
    std::fill(answers.begin(), answers.end(), std::nullopt);
    answers[static_cast<std::size_t>(rank)] = self();
    for (int peer = 0; peer < size; ++peer) {
      if (peer != rank) { send(peer, kAsk, {round, 0, 0, 0, 0}); }
    }
    const Clock::time_point start = Clock::now();
    while (!stop.stop_requested() && seconds_since(start) < kGraceSeconds &&
           std::any_of(answers.begin(), answers.end(), [](const auto& a) { return !a.has_value(); })) {
      serve();
      std::this_thread::sleep_for(kPoll);
    }
  }

  std::string name_of(int peer) const { return fmt::format("rank {} ({})", peer, hosts[static_cast<std::size_t>(peer)]); }

  void interrogate() {
    const std::string situation = owner.describe();
    ask_all();
    // All ranks have come to the end, and those that were asked may have stopped answering.
    if (stop.stop_requested()) { return; }
    std::string silent;
    int leader = -1;
    for (int peer = 0; peer < size; ++peer) {
      if (answers[static_cast<std::size_t>(peer)]) {
        leader = leader < 0 ? peer : leader;
      } else {
        silent += (silent.empty() ? "" : ", ") + name_of(peer);
      }
    }
    if (!silent.empty()) {
      end_job(leader, fmt::format("{}no progress for {:.3g} s and no answer from {}", situation, seconds_since(quiet_since), silent));
      return;
    }
    const bool moved = !std::equal(answers.begin(), answers.end(), last_answers.begin(), [](const auto& now, const auto& before) {
      return before && now->progress == before->progress && now->step == before->step && now->waiting == before->waiting;
    });
    last_answers = answers;
    quiet_rounds = moved ? 0 : quiet_rounds + 1;
    if (moved) { return; }
    // Ranks that only compute, their transfers open, harm nobody however long it takes.
    if (std::none_of(answers.begin(), answers.end(), [](const auto& answer) { return answer->waiting != 0; })) {
      quiet_rounds = 0;
      return;
    }
    for (int peer = 0; peer < size; ++peer) {
      const Answer& answer = *answers[static_cast<std::size_t>(peer)];
      if (answer.waiting != 0) { continue; }
      if (quiet_rounds >= kComputePatience) {
        end_job(leader, fmt::format("{}{} has computed without progress for {:g} s", in_step(answer.step), name_of(peer),
                                    patience_s * quiet_rounds));
      }
      return;
    }
    std::string who;
    for (int peer = 0; peer < size; ++peer) {
      const Answer& answer = *answers[static_cast<std::size_t>(peer)];
      who += fmt::format("{}rank {} for {}, {}", who.empty() ? "" : "; ", peer,
                         answer.peer < 0 ? std::string("all") : fmt::format("rank {}", answer.peer),
                         answer.step < 0 ? std::string("outside the ring") : fmt::format("in step {}", answer.step));
    }
    end_job(leader, fmt::format("{}all ranks wait for each other without progress for {:g} s: {}", situation, timeout_s, who));
  }

  /// The lowest rank that answers speaks for all; the others give it time and then speak themselves.
  void end_job(int leader, const std::string& message) {
    if (rank != leader) {
      const Clock::time_point start = Clock::now();
      while (seconds_since(start) < kGraceSeconds + 2.0 || (abort_announced && seconds_since(*abort_announced) < 10.0)) {
        if (stop.stop_requested()) { return; }
        serve();
        std::this_thread::sleep_for(kPoll);
      }
    }
    for (int peer = 0; peer < size; ++peer) {
      if (peer != rank && answers[static_cast<std::size_t>(peer)]) { send(peer, kAborting, {}); }
    }
    serve();
    abort(message);
  }

  Watchdog& owner;
  MPI_Comm comm = MPI_COMM_NULL;
  int rank = 0;
  int size = 1;
  double timeout_s;
  /// Quiet time before the others are asked: with the time they are given to answer, and a launcher to end them, a silent one has ended the
  /// job within a timeout of 10 s or more. To find that ranks which do answer are stuck takes two rounds, so never less than the timeout.
  double patience_s = std::max(timeout_s - kGraceSeconds - kEndSeconds, timeout_s / 2);
  std::vector<std::string> hosts;
  std::function<void(std::string_view)> abort;
  std::vector<std::unique_ptr<std::pair<Answer, MPI_Request>>> in_flight;
  std::vector<std::optional<Answer>> answers;
  std::vector<std::optional<Answer>> last_answers;
  std::int64_t round = 0;
  int quiet_rounds = 0;
  std::uint64_t seen_progress = 0;
  Clock::time_point quiet_since = Clock::now();
  std::optional<Clock::time_point> abort_announced;
  std::stop_token stop;  ///< of the thread, which alone uses it
  std::jthread thread;
};

Watchdog::Watchdog() = default;

Watchdog::Watchdog(MPI_Comm comm, double timeout_s, std::string host, std::function<void(std::string_view)> abort) {
  thread_ = std::make_unique<Thread>(*this, comm, timeout_s, std::move(host), std::move(abort));
}

Watchdog::~Watchdog() {
  if (!thread_) { return; }
  if (unwinding()) {
    // Peers may be gone: no collective call; the thread ends with the process that is about to end.
    thread_->thread.request_stop();
    thread_->thread.join();
    return;
  }
  {
    // Nobody stops answering before everybody has stopped waiting.
    const Wait wait = waiting("the end of the job");
    MPI_Barrier(thread_->comm);
  }
  thread_->thread.request_stop();
  thread_->thread.join();
  MPI_Comm_free(&thread_->comm);
}

Watchdog::Wait Watchdog::waiting(const char* operation, std::int64_t peer, std::int64_t bytes, std::int64_t step) {
  const std::scoped_lock lock(mutex_);
  if (waits_.empty()) { progress(); }
  waits_.push_back({next_++, operation, peer, bytes, step});
  return {this, waits_.back().number};
}

Watchdog::Wait Watchdog::exposed() {
  exposed_.fetch_add(1);
  progress();
  return {this, 0};
}

void Watchdog::end(std::uint64_t number) {
  if (number == 0) {
    exposed_.fetch_sub(1);
    return;
  }
  const std::scoped_lock lock(mutex_);
  std::erase_if(waits_, [&](const Waited& wait) { return wait.number == number; });
}

Watchdog::Waited Watchdog::oldest_wait() const {
  const std::scoped_lock lock(mutex_);
  Waited oldest = waits_.empty() ? Waited() : waits_.front();
  if (oldest.step < 0) { oldest.step = step_.load(); }
  return oldest;
}

std::string Watchdog::describe() const {
  const Waited wait = oldest_wait();
  std::string text = in_step(wait.step);
  if (wait.operation != nullptr) {
    text += fmt::format("{}{}", wait.operation, wait.peer >= 0 ? fmt::format(" with rank {}", wait.peer) : std::string());
    if (wait.bytes > 0) { text += fmt::format(" ({} bytes)", wait.bytes); }
    text += ": ";
  }
  return text;
}

}  // namespace annulus
