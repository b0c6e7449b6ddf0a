// SPDX-License-Identifier: Apache-2.0
#include "unfinished_table.hpp"

#include <annulus/core/at_abort.hpp>
#include <annulus/core/error.hpp>
#include <annulus/io/result_file.hpp>

#include <array>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <sys/stat.h>
#include <unistd.h>

namespace annulus {

namespace {

/// What becomes of a file if the process ends.
enum class Fate { removed, complete, resumable };

struct Slot {
  std::atomic<pid_t> owner{0};  ///< 0: free; kClaimed: being filled; else the process that writes the file (a forked child does not)
  std::atomic<Fate> fate{Fate::removed};
  FileId file;
  std::array<char, PATH_MAX> path{};
};
constexpr pid_t kClaimed = -1;
std::array<Slot, 8> slots;
static_assert(std::atomic<pid_t>::is_always_lock_free && std::atomic<Fate>::is_always_lock_free);

/// write() to standard error; where that fails, nothing can be said.
void say(const char* text) noexcept {
  if (::write(STDERR_FILENO, text, std::strlen(text)) < 0) { return; }
}

}  // namespace

int enter_unfinished(const std::string& path, FileId file) {
  at_abort(remove_unfinished_results);
  for (std::size_t n = 0; n < slots.size(); ++n) {
    pid_t free_slot = 0;
    if (!slots[n].owner.compare_exchange_strong(free_slot, kClaimed)) { continue; }
    std::memcpy(slots[n].path.data(), path.c_str(), path.size() + 1);
    slots[n].file = file;
    slots[n].fate.store(Fate::removed);
    slots[n].owner.store(::getpid());
    return static_cast<int>(n);
  }
  ANNULUS_ASSERT(false, "more than {} result files are being written at once", slots.size());
  return -1;
}

void mark_complete(int place) noexcept { slots[static_cast<std::size_t>(place)].fate.store(Fate::complete); }

void mark_resumable(int place) noexcept { slots[static_cast<std::size_t>(place)].fate.store(Fate::resumable); }

void leave_unfinished(int place) noexcept { slots[static_cast<std::size_t>(place)].owner.store(0); }

bool is_file(const char* path, FileId file) noexcept {
  struct stat status{};
  return ::lstat(path, &status) == 0 && FileId{status.st_dev, status.st_ino} == file;
}

void unlink_own(const char* path, FileId file) noexcept {
  if (is_file(path, file)) { ::unlink(path); }
}

void remove_unfinished_results() noexcept {
  const int saved_errno = errno;
  for (const Slot& slot : slots) {
    if (slot.owner.load() != ::getpid()) { continue; }
    const Fate fate = slot.fate.load();
    if (fate == Fate::removed) {
      unlink_own(slot.path.data(), slot.file);
    } else if (is_file(slot.path.data(), slot.file)) {
      say(fate == Fate::complete ? "annulus: interrupted while the result was put in its place; the complete result is kept as '"
                                 : "annulus: interrupted between parts; --resume goes on with '");
      say(slot.path.data());
      say("'\n");
    }
  }
  errno = saved_errno;
}

}  // namespace annulus
