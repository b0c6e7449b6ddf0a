// SPDX-License-Identifier: Apache-2.0
#include "unfinished_path.hpp"

#include <annulus/core/error.hpp>

#include "disk_calls.hpp"

#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdio>
#include <fcntl.h>
#include <filesystem>
#include <random>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

namespace annulus {

namespace {

/// Beside `path`, so that renaming stays inside one file system; hidden, so that *.h5 does not match an unfinished file. Random, because
/// process ids repeat: on other hosts, and in containers, where they are small.
std::string temporary_name(const std::string& path) {
  constexpr std::size_t kNameBytes = 200;  // of the 255 that file systems allow
  const std::filesystem::path target(path);
  std::string name = target.filename().string();
  if (name.size() > kNameBytes) {
    std::size_t end = kNameBytes;
    while (end > 0 && (static_cast<unsigned char>(name[end]) & 0xC0U) == 0x80U) { --end; }  // no letter of UTF-8 is cut
    name.resize(end);
  }
  std::random_device device;
  return (target.parent_path() / fmt::format(".{}.partial-{:08x}{:08x}", name, device(), device())).string();
}

/// Keeps signals away from this thread while it lasts.
class HeldSignals {
 public:
  HeldSignals() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  ~HeldSignals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  HeldSignals(const HeldSignals&) = delete;
  HeldSignals& operator=(const HeldSignals&) = delete;

 private:
  sigset_t before_{};
};

}  // namespace

UnfinishedPath::UnfinishedPath(const std::string& path, bool force)
    : shown_path_(path), force_(force), place_(resolve_result_place(path, force)) {
  const int error = create();
  ANNULUS_EXPECTS(error == 0, "{}: '{}' cannot be created: {}", describe(), temporary_, system_message(error));
}

UnfinishedPath::~UnfinishedPath() {
  if (slot_ >= 0) {
    unlink_own(temporary_.c_str(), file_);
    leave_unfinished(slot_);
  }
  for (const int descriptor : {descriptor_, published_descriptor_}) {
    if (descriptor >= 0) { ::close(descriptor); }
  }
}

std::string UnfinishedPath::describe() const { return fmt::format("result file '{}'", shown_path_); }

/// Creates the temporary file, which must not be there; 0 or the error.
int UnfinishedPath::create() {
  // What will replace a file is nobody else's to read before it has that file's mode.
  const mode_t mode = place_.replaces ? 0600 : 0666;
  // A signal that came between creation and entry would leave the file: it waits.
  const HeldSignals held;
  constexpr int kNames = 16;  // of 2^64; one that is taken belongs to another
  int error = EEXIST;
  for (int attempt = 0; attempt < kNames && error == EEXIST; ++attempt) {
    temporary_ = temporary_name(place_.path);
    if (temporary_.size() >= PATH_MAX) { return ENAMETOOLONG; }
    descriptor_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    error = descriptor_ >= 0 ? 0 : errno;
  }
  struct stat status{};
  if (error == 0 && ::fstat(descriptor_, &status) != 0) { error = errno; }
  if (error != 0) { return error; }
  file_ = {status.st_dev, status.st_ino};
  slot_ = enter_unfinished(temporary_, file_);
  return 0;
}

void UnfinishedPath::reserve(std::int64_t bytes) const {
  const int error = reserve_blocks(descriptor_, bytes);
  if (error != 0) { throw RuntimeFailure(fmt::format("{} needs {} bytes: {}", describe(), bytes, system_message(error))); }
}

/// Gives the temporary file the mode of the one that it replaces, and its owner where that is allowed.
void UnfinishedPath::adopt_replaced() const noexcept {
  struct stat old{};
  const bool is_there = (force_ || place_.replaces) && ::lstat(place_.path.c_str(), &old) == 0 && S_ISREG(old.st_mode);
  if (!is_there && !place_.replaces) { return; }  // the mode is what the process gives to new files
  mode_t mode = is_there ? old.st_mode & 07777U : place_.mode;
  const bool of_its_group =
      !is_there || ::fchown(descriptor_, old.st_uid, old.st_gid) == 0 || ::fchown(descriptor_, static_cast<uid_t>(-1), old.st_gid) == 0;
  // A group that could not be given away must not get what another was allowed.
  if (!of_its_group) { mode = (mode & ~static_cast<mode_t>(S_IRWXG)) | ((mode & S_IRWXO) << 3U); }
  if (::fchmod(descriptor_, mode) != 0) { return; }  // a file system without modes
}

/// Renames the temporary file to its place; 0 or the error.
int UnfinishedPath::move_into_place() const noexcept {
  const bool ours = published_ && is_file(place_.path.c_str(), *published_);
  const int error = force_ || ours ? (::rename(temporary_.c_str(), place_.path.c_str()) == 0 ? 0 : errno)
                                   : rename_to_absent(temporary_.c_str(), place_.path.c_str());
  // A server that answers a repeated request may report the failure of what it has already done.
  return error != 0 && is_file(place_.path.c_str(), file_) ? 0 : error;
}

/// Leaves the complete temporary file where it is and says so.
void UnfinishedPath::keep(const std::string& what) {
  leave_unfinished(slot_);
  slot_ = -1;
  throw RuntimeFailure(fmt::format("{} {}; the complete result is kept as '{}'", describe(), what, temporary_));
}

void UnfinishedPath::publish() {
  ANNULUS_ASSERT(slot_ >= 0, "{} is published twice", describe());
  // Syncing may take long. What was published before serves as well, and is in its place.
  if (!published_) { mark_complete(slot_); }
  adopt_replaced();
  if (const int error = sync_file(descriptor_); error != 0) { keep(fmt::format("cannot be synced: {}", system_message(error))); }
  const int error = move_into_place();
  if (error == EEXIST) { keep("was created by another program meanwhile"); }
  if (error != 0) { keep(fmt::format("cannot be renamed into place: {}", system_message(error))); }
  leave_unfinished(slot_);
  slot_ = -1;
  published_ = file_;
  struct stat status{};
  place_.replaces = ::fstat(descriptor_, &status) == 0;
  place_.mode = status.st_mode & 07777U;
  if (published_descriptor_ >= 0) { ::close(published_descriptor_); }
  published_descriptor_ = std::exchange(descriptor_, -1);
  const std::string folder = std::filesystem::path(place_.path).parent_path().string();
  if (const int lost = sync_folder(folder); lost != 0) {
    throw RuntimeFailure(fmt::format("{} is written, but its folder cannot be synced: {}", describe(), system_message(lost)));
  }
}

void UnfinishedPath::renew() {
  ANNULUS_ASSERT(slot_ < 0 && published_, "{} is written again before it is published", describe());
  const int error = create();
  if (error != 0) { throw RuntimeFailure(fmt::format("{}: '{}' cannot be created: {}", describe(), temporary_, system_message(error))); }
}

}  // namespace annulus
