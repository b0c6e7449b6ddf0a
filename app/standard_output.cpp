// SPDX-License-Identifier: Apache-2.0
#include "standard_output.hpp"

#include <annulus/core/error.hpp>

#include <poll.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <system_error>
#include <unistd.h>

namespace annulus::app {

namespace {

/// Printed and not yet written; not stdio's, which forgets what a pipe that does not block had no room for.
std::string& pending() {
  static std::string text;
  return text;
}
constexpr std::size_t kPendingBytes = std::size_t{64} << 10;
int failure = 0;  ///< errno of the first failure
std::atomic<const char*> open_ending{nullptr};
static_assert(std::atomic<const char*>::is_always_lock_free);

/// Writes all of `text`; 0 or the error.
int write_all(std::string_view text) noexcept {
  while (!text.empty()) {
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno == EAGAIN) {
      pollfd output{STDOUT_FILENO, POLLOUT, 0};
      ::poll(&output, 1, -1);
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

}  // namespace

void hold_standard_descriptors() {
  for (const int descriptor : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::fcntl(descriptor, F_GETFD) >= 0) { continue; }
    // The lowest free number is this one. Opened the wrong way around, it still refuses what was closed.
    if (::open("/dev/null", descriptor == STDIN_FILENO ? O_WRONLY : O_RDONLY) < 0) { return; }
  }
}

void print_text(std::string_view text) {
  if (failure != 0) { return; }
  pending().append(text);
  static const bool interactive = ::isatty(STDOUT_FILENO) != 0;
  if (interactive || pending().size() >= kPendingBytes) { flush_output(); }
}

void flush_output() noexcept {
  const char* ending = open_ending.exchange(nullptr);  // not while half of something is written
  if (failure == 0) { failure = write_all(pending()); }
  pending().clear();
  open_ending.store(ending);
}

void finish_output() {
  flush_output();
  // Network file systems tell of a full disk when a descriptor is closed; this one stays open.
  const int copy = failure == 0 ? ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 0) : -1;
  if (copy >= 0 && ::close(copy) != 0 && errno != EINTR) { failure = errno; }
  if (failure != 0) {
    throw RuntimeFailure(fmt::format("standard output cannot be written: {}", std::generic_category().message(failure)));
  }
}

void set_open_ending(const char* ending) noexcept { open_ending.store(ending); }

void print_open_ending() noexcept {
  const int saved_errno = errno;
  const char* ending = open_ending.load();
  if (ending != nullptr && ::write(STDOUT_FILENO, ending, std::strlen(ending)) < 0) { errno = saved_errno; }
  errno = saved_errno;
}

}  // namespace annulus::app
