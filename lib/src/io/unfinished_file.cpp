// SPDX-License-Identifier: Apache-2.0
#include "unfinished_file.hpp"

#include <annulus/core/error.hpp>
#include <annulus/io/result_file.hpp>

#include <array>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <string_view>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

namespace annulus {

namespace {

std::string system_message(int error) { return std::generic_category().message(error); }

/// A temporary file that a signal handler may have to remove; a static table, since handlers may not allocate nor lock.
struct Slot {
  std::atomic<pid_t> owner{0};  ///< 0: free; kClaimed: being filled; else the process that writes the file (a forked child does not)
  std::array<char, PATH_MAX> path{};
};
constexpr pid_t kClaimed = -1;
std::array<Slot, 8> slots;
static_assert(std::atomic<pid_t>::is_always_lock_free);

int register_temporary(const std::string& path) {
  for (std::size_t n = 0; n < slots.size(); ++n) {
    pid_t free_slot = 0;
    if (!slots[n].owner.compare_exchange_strong(free_slot, kClaimed)) { continue; }
    std::memcpy(slots[n].path.data(), path.c_str(), path.size() + 1);
    slots[n].owner.store(::getpid());
    return static_cast<int>(n);
  }
  ANNULUS_ASSERT(false, "more than {} result files are being written at once", slots.size());
  return -1;
}

/// Where a result of this name would lie: absolute, and behind a symbolic link if `path` is one. Refuses what cannot be a result.
std::string resolve_result_path(const std::string& path, bool force) {
  namespace fs = std::filesystem;
  ANNULUS_EXPECTS(!path.empty(), "the result file's name is empty");
  ANNULUS_EXPECTS(path.back() != '/', "result file '{}' names a folder", path);
  std::error_code error;
  fs::path target = fs::absolute(path, error);
  ANNULUS_EXPECTS(!error, "result file '{}': {}", path, error.message());

  struct stat status{};
  if (::lstat(target.c_str(), &status) == 0 && S_ISLNK(status.st_mode)) {
    target = fs::canonical(target, error);
    ANNULUS_EXPECTS(!error, "result file '{}' is a symbolic link that leads nowhere: {}", path, error.message());
  }
  if (::stat(target.c_str(), &status) == 0) {
    ANNULUS_EXPECTS(!S_ISDIR(status.st_mode), "result file '{}' is a folder", path);
    ANNULUS_EXPECTS(S_ISREG(status.st_mode), "result file '{}' is a device, pipe or socket, not a regular file", path);
    ANNULUS_EXPECTS(force, "result file '{}' exists; --force replaces it", path);
  } else {
    const int reason = errno;
    ANNULUS_EXPECTS(reason == ENOENT, "result file '{}': {}", path, system_message(reason));
  }
  const fs::path folder = target.parent_path();
  ANNULUS_EXPECTS(::stat(folder.c_str(), &status) == 0, "result file '{}': folder '{}': {}", path, folder.string(), system_message(errno));
  ANNULUS_EXPECTS(S_ISDIR(status.st_mode), "result file '{}': '{}' is not a folder", path, folder.string());
  ANNULUS_EXPECTS(::access(folder.c_str(), W_OK | X_OK) == 0, "result file '{}': folder '{}' cannot be written: {}", path, folder.string(),
                  system_message(errno));
  return target.string();
}

/// Beside `path`, so that renaming stays inside one file system; hidden, so that *.h5 does not match an unfinished file.
std::string temporary_name(const std::string& path) {
  static std::atomic<int> next{0};
  const std::filesystem::path target(path);
  constexpr std::size_t kNameBytes = 200;  // of the 255 that file systems allow
  return (target.parent_path() / fmt::format(".{}.partial-{}-{}", target.filename().string().substr(0, kNameBytes), ::getpid(), next++))
      .string();
}

/// fsync of a file or folder; 0 or the error.
int sync_path(const char* path) {
  const int descriptor = ::open(path, O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) { return errno; }
  const int error = ::fsync(descriptor) == 0 ? 0 : errno;
  ::close(descriptor);
  return error == EINVAL ? 0 : error;  // some network file systems do not sync folders
}

/// rename(2) that does not replace an existing file; 0 or the error.
int rename_to_absent(const char* from, const char* to) {
  if (::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) { return 0; }
  if (errno != EINVAL && errno != ENOSYS) { return errno; }
  // Network file systems lack the flag; a hard link refuses an existing name just as well.
  if (::link(from, to) == 0) { return ::unlink(from) == 0 ? 0 : errno; }
  if (errno != EPERM && errno != EOPNOTSUPP) { return errno; }
  if (::access(to, F_OK) == 0) { return EEXIST; }
  return ::rename(from, to) == 0 ? 0 : errno;
}

}  // namespace

UnfinishedPath::UnfinishedPath(const std::string& path, bool force)
    : shown_path_(path), path_(resolve_result_path(path, force)), temporary_(temporary_name(path_)), force_(force) {
  ANNULUS_EXPECTS(temporary_.size() < PATH_MAX, "result file '{}': the path is longer than {} bytes", path, PATH_MAX);
  slot_ = register_temporary(temporary_);
}

UnfinishedPath::~UnfinishedPath() {
  if (!finished_) { discard(); }
}

std::string UnfinishedPath::describe() const { return fmt::format("result file '{}'", shown_path_); }

void UnfinishedPath::publish() {
  ANNULUS_ASSERT(!finished_, "{} is published twice", describe());
  const auto require = [&](int error, const char* what) {
    if (error != 0) { throw RuntimeFailure(fmt::format("{} cannot be {}: {}", describe(), what, system_message(error))); }
  };
  require(sync_path(temporary_.c_str()), "synced");
  if (force_) {
    require(::rename(temporary_.c_str(), path_.c_str()) == 0 ? 0 : errno, "renamed into place");
  } else {
    const int error = rename_to_absent(temporary_.c_str(), path_.c_str());
    ANNULUS_EXPECTS(error != EEXIST, "{} was created by another program meanwhile; --force replaces it", describe());
    require(error, "renamed into place");
  }
  finished_ = true;
  slots[static_cast<std::size_t>(slot_)].owner.store(0);
  require(sync_path(std::filesystem::path(path_).parent_path().c_str()), "synced (its folder)");
}

void UnfinishedPath::discard() noexcept {
  ::unlink(temporary_.c_str());
  slots[static_cast<std::size_t>(slot_)].owner.store(0);
  finished_ = true;
}

UnfinishedFile::UnfinishedFile(const std::string& path, bool force) : place_(path, force) {
  const Hdf5Lock lock;
  const Hdf5Handle access(check_h5(H5Pcreate(H5P_FILE_ACCESS), "H5Pcreate"));
  // Whatever handle an exception left open, closing the file closes it.
  check_h5(H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG), "H5Pset_fclose_degree");
#if H5_VERSION_GE(1, 10, 7)
  check_h5(H5Pset_file_locking(access.get(), true, true), "H5Pset_file_locking");
#endif
  file_ = Hdf5Handle(H5Fcreate(place_.temporary().c_str(), H5F_ACC_EXCL, H5P_DEFAULT, access.get()));
  if (!file_) {
    throw RuntimeFailure(fmt::format("{}: '{}' cannot be created: {}", describe(), place_.temporary(), innermost_hdf5_error()));
  }
}

UnfinishedFile::~UnfinishedFile() = default;  // closes the file, then its place unlinks it

void UnfinishedFile::reserve_allocated() {
  const Hdf5Lock lock;
  if (H5Fflush(file_.get(), H5F_SCOPE_LOCAL) < 0) {
    throw RuntimeFailure(fmt::format("{} cannot be written: {}", describe(), innermost_hdf5_error()));
  }
  hsize_t bytes = 0;
  check_h5(H5Fget_filesize(file_.get(), &bytes), "H5Fget_filesize");
  const int descriptor = ::open(place_.temporary().c_str(), O_WRONLY | O_CLOEXEC);
  int error = descriptor < 0 ? errno : 0;
  if (error == 0) {
    if (::fallocate(descriptor, FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(bytes)) != 0) { error = errno; }
    ::close(descriptor);
  }
  if (error != 0 && error != EOPNOTSUPP && error != ENOSYS && error != EINTR) {
    throw RuntimeFailure(fmt::format("{} needs {} bytes: {}", describe(), bytes, system_message(error)));
  }
}

void UnfinishedFile::commit() {
  ANNULUS_ASSERT(file_, "{} is committed twice", describe());
  {
    const Hdf5Lock lock;
    // A failed close leaves no file to close again, hence release(), and hence the flush, which finds nearly every failure first.
    if (H5Fflush(file_.get(), H5F_SCOPE_LOCAL) < 0 || H5Fclose(file_.release()) < 0) {
      throw RuntimeFailure(fmt::format("{} cannot be written: {}", describe(), innermost_hdf5_error()));
    }
  }
  place_.publish();
}

void write_text_result(const std::string& path, bool force, std::string_view text) {
  UnfinishedPath place(path, force);
  const auto require = [&](bool succeeded, const char* what) {
    if (!succeeded) { throw RuntimeFailure(fmt::format("{} cannot be {}: {}", place.describe(), what, system_message(errno))); }
  };
  const int descriptor = ::open(place.temporary().c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  require(descriptor >= 0, "created");
  int error = 0;
  while (!text.empty() && error == 0) {
    const ssize_t written = ::write(descriptor, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (::close(descriptor) != 0 && error == 0) { error = errno; }
  errno = error;
  require(error == 0, "written");
  place.publish();
}

void check_result_path(const std::string& path, bool force) { resolve_result_path(path, force); }

void remove_unfinished_results() noexcept {
  const int saved_errno = errno;
  for (const Slot& slot : slots) {
    if (slot.owner.load() == ::getpid()) { ::unlink(slot.path.data()); }
  }
  errno = saved_errno;
}

}  // namespace annulus
