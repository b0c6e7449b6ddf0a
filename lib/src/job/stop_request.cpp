// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/stop_request.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdint>

namespace annulus {

namespace {

// Of the process, since a handler is given nothing but the signal's number.
std::atomic<bool> lives{false};
std::atomic<bool> heeded{false};
std::atomic<bool> user_signal{false};
std::atomic<bool> termination{false};
static_assert(std::atomic<bool>::is_always_lock_free);

}  // namespace

std::string_view describe(StopCause cause) {
  switch (cause) {
    case StopCause::none:
      break;
    case StopCause::time_limit:
      return "its time limit";
    case StopCause::user_signal:
      return "SIGUSR1";
    case StopCause::termination:
      return "SIGTERM";
  }
  return {};
}

StopRequest::StopRequest() {
  ANNULUS_ASSERT(!lives.exchange(true), "two stop requests live in one process");
  user_signal.store(false);
  termination.store(false);
}

StopRequest::~StopRequest() {
  heeded.store(false);
  lives.store(false);
}

void StopRequest::heed_signals() noexcept { heeded.store(true); }

bool StopRequest::agreed(const Communicator& comm) {
  if (agreed_ != StopCause::none) { return true; }
  StopCause own = StopCause::none;
  const double elapsed_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  if (limit_s_ > 0 && elapsed_s >= limit_s_) { own = StopCause::time_limit; }
  if (user_signal.load()) { own = StopCause::user_signal; }
  if (termination.load()) { own = StopCause::termination; }
  agreed_ = static_cast<StopCause>(comm.max(static_cast<std::int64_t>(own)));
  return agreed_ != StopCause::none;
}

bool take_stop_signal(int signal) noexcept {
  if (!heeded.load()) { return false; }
  if (signal == SIGUSR1) {
    user_signal.store(true);
    return true;
  }
  return signal == SIGTERM && !termination.exchange(true);
}

}  // namespace annulus
