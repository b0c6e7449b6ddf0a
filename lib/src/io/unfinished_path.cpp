// SPDX-License-Identifier: Apache-2.0
#include "unfinished_path.hpp"

#include <annulus/core/error.hpp>

#include "disk_calls.hpp"

#include <algorithm>
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
#include <vector>

namespace annulus {

namespace {

constexpr int kMostNames = 16;  // of 2^64 are tried; one that is taken belongs to another

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

void close_if_open(int descriptor) noexcept {
  if (descriptor >= 0) { ::close(descriptor); }
}

/// Copies a whole file to the beginning of another; 0 or the error. Both end with the position that `from` had.
int copy_file(int from, int to) {
  constexpr std::size_t kPart = std::size_t{1} << 20;
  std::vector<char> part(kPart);
  off_t done = 0;
  for (;;) {
    const ssize_t got = ::pread(from, part.data(), part.size(), done);
    if (got < 0 && errno == EINTR) { continue; }
    if (got < 0) { return errno; }
    if (got == 0) { break; }
    for (ssize_t put = 0; put < got;) {
      const ssize_t written = ::pwrite(to, part.data() + put, static_cast<std::size_t>(got - put), done + put);
      if (written < 0 && errno != EINTR) { return errno; }
      put += std::max<ssize_t>(0, written);
    }
    done += got;
  }
  return ::lseek(to, ::lseek(from, 0, SEEK_CUR), SEEK_SET) < 0 ? errno : 0;
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

UnfinishedPath::UnfinishedPath(const std::string& path, bool force, const ResumableFile& file)
    : shown_path_(path), force_(force), place_(resolve_result_place(path, force)), temporary_(file.path), resumable_(true) {
  const HeldSignals held;
  descriptor_ = ::open(temporary_.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  ANNULUS_EXPECTS(descriptor_ >= 0, "{}: '{}' cannot be opened: {}", describe(), temporary_, system_message(errno));
  struct flock whole{};
  whole.l_type = F_WRLCK;
  const bool in_use = ::fcntl(descriptor_, F_OFD_SETLK, &whole) != 0 && (errno == EAGAIN || errno == EACCES);
  struct stat status{};
  const bool is_regular = ::fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
  if (in_use || !is_regular) {
    close_if_open(descriptor_);
    throw InvalidArgument(fmt::format("{}: '{}' is {}", describe(), temporary_, in_use ? "being written by another run" : "no file"));
  }
  file_ = {status.st_dev, status.st_ino};
  slot_ = enter_unfinished(temporary_, file_);
  mark_resumable(slot_);
}

UnfinishedPath::~UnfinishedPath() {
  if (slot_ >= 0) {
    if (!resumable_) { unlink_own(temporary_.c_str(), file_); }
    leave_unfinished(slot_);
  }
  for (const int descriptor : {descriptor_, lost_descriptor_, published_descriptor_}) { close_if_open(descriptor); }
}

std::string UnfinishedPath::describe() const { return fmt::format("result file '{}'", shown_path_); }

/// Creates the temporary file, which must not be there; 0 or the error.
int UnfinishedPath::create() {
  // A signal that came between creation and entry would leave the file: it waits.
  const HeldSignals held;
  int error = EEXIST;
  for (int attempt = 0; attempt < kMostNames && error == EEXIST; ++attempt) {
    temporary_ = temporary_name(place_.path);
    if (temporary_.size() >= PATH_MAX) { return ENAMETOOLONG; }
    descriptor_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, first_mode());
    error = descriptor_ >= 0 ? 0 : errno;
  }
  struct stat status{};
  if (error == 0 && ::fstat(descriptor_, &status) != 0) { error = errno; }
  if (error != 0) { return error; }
  file_ = {status.st_dev, status.st_ino};
  slot_ = enter_unfinished(temporary_, file_);
  return 0;
}

void UnfinishedPath::lose_name(int opened) {
  if (slot_ < 0) { return; }
  const std::string folder = std::filesystem::path(temporary_).parent_path().string();
  const int nameless = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, first_mode());
  if (nameless < 0) { return; }
  struct stat status{};
  if (::fstat(nameless, &status) != 0 || copy_file(opened >= 0 ? opened : descriptor_, nameless) != 0 ||
      (opened >= 0 && ::dup2(nameless, opened) < 0)) {
    ::close(nameless);
    return;
  }
  close_if_open(lost_descriptor_);
  lost_descriptor_ = std::exchange(descriptor_, nameless);
  unlink_own(temporary_.c_str(), file_);
  leave_unfinished(slot_);
  slot_ = -1;
  file_ = {status.st_dev, status.st_ino};
}

void UnfinishedPath::restart() {
  if (slot_ >= 0) { return; }
  const int old = std::exchange(descriptor_, -1);
  const int error = create();
  close_if_open(old);
  if (error != 0) { throw RuntimeFailure(fmt::format("{}: '{}' cannot be created: {}", describe(), temporary_, system_message(error))); }
}

/// Gives the nameless file a temporary name; 0 or the error.
int UnfinishedPath::link_to_name() {
  const std::string link = fmt::format("/proc/self/fd/{}", descriptor_);
  const HeldSignals held;
  int error = EEXIST;
  for (int attempt = 0; attempt < kMostNames && error == EEXIST; ++attempt) {
    temporary_ = temporary_name(place_.path);
    error = ::linkat(AT_FDCWD, link.c_str(), AT_FDCWD, temporary_.c_str(), AT_SYMLINK_FOLLOW) == 0 ? 0 : errno;
  }
  if (error == 0) { slot_ = enter_unfinished(temporary_, file_); }
  return error;
}

void UnfinishedPath::take_name() {
  const int refused = link_to_name();
  if (refused == 0) { return; }
  // No /proc, or a file system that makes nameless files and no links.
  const int nameless = std::exchange(descriptor_, -1);
  int error = create();
  if (error == 0) { error = copy_file(nameless, descriptor_); }
  close_if_open(nameless);
  if (error != 0) {
    throw RuntimeFailure(fmt::format("{} can be given no name in its folder: {}; nor be copied to '{}': {}", describe(),
                                     system_message(refused), temporary_, system_message(error)));
  }
}

void UnfinishedPath::sync() const {
  if (const int error = sync_file(descriptor_); error != 0) {
    throw RuntimeFailure(fmt::format("{} cannot be synced: {}", describe(), system_message(error)));
  }
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
  ANNULUS_ASSERT(descriptor_ >= 0, "{} is published twice", describe());
  if (slot_ < 0) { take_name(); }
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
  close_if_open(published_descriptor_);
  published_descriptor_ = std::exchange(descriptor_, -1);
  const std::string folder = std::filesystem::path(place_.path).parent_path().string();
  if (const int lost = sync_folder(folder); lost != 0) {
    throw RuntimeFailure(fmt::format("{} is written, but its folder cannot be synced: {}", describe(), system_message(lost)));
  }
}

void UnfinishedPath::renew() {
  ANNULUS_ASSERT(descriptor_ < 0 && published_, "{} is written again before it is published", describe());
  restart();
}

}  // namespace annulus
