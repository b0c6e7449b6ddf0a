// SPDX-License-Identifier: Apache-2.0
#include "hdf5_open.hpp"

#include <annulus/core/error.hpp>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <string_view>
#include <sys/file.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

namespace annulus {

namespace {

std::string system_message(int error) { return std::generic_category().message(error); }

/// What HDF5_USE_FILE_LOCKING asks for; HDF5 heeds it above any property.
enum class LockWish { unset, off, on };

LockWish lock_wish() {
  const char* text = std::getenv("HDF5_USE_FILE_LOCKING");
  const std::string_view wish = text == nullptr ? "" : text;
  if (wish == "FALSE" || wish == "0") { return LockWish::off; }
  return wish == "TRUE" || wish == "1" || wish == "BEST_EFFORT" ? LockWish::on : LockWish::unset;
}

/// Locks the file if its file system can.
void lock_shared(const std::string& what, int descriptor) {
  const LockWish wish = lock_wish();
  if (wish == LockWish::off || ::flock(descriptor, LOCK_SH | LOCK_NB) == 0) { return; }
  const int error = errno;
  ANNULUS_EXPECTS(error != EWOULDBLOCK,
                  "{} is locked by a process that has it open for writing; wait until it is closed, or set HDF5_USE_FILE_LOCKING=FALSE to "
                  "read it as it is",
                  what);
#if H5_VERSION_GE(1, 10, 7)
  ANNULUS_EXPECTS(
      wish == LockWish::unset,
      "{} cannot be locked: {}; HDF5_USE_FILE_LOCKING={} asks for a lock, and with HDF5_USE_FILE_LOCKING=FALSE the file is read "
      "without one",
      what, system_message(error), std::getenv("HDF5_USE_FILE_LOCKING"));
#else
  throw InvalidArgument(
      fmt::format("{} cannot be locked: {}; set HDF5_USE_FILE_LOCKING=FALSE to read it without a lock", what, system_message(error)));
#endif
}

/// Turns HDF5's own locks off in the properties that it gives every file without others, its virtual datasets' parts among them. All files
/// must have the same: HDF5 does not open one a second time with another.
void leave_locks_to_us() {
#if H5_VERSION_GE(1, 10, 7)
  static const herr_t done = H5Pset_file_locking(H5P_FILE_ACCESS_DEFAULT, false, true);
  check_h5(done, "H5Pset_file_locking");
#endif
}

/// Everything that HDF5's error stack says, outermost first.
struct ErrorText {
  std::string all;
  bool by_system = false;
};

herr_t append_text(unsigned /*depth*/, const H5E_error2_t* error, void* text) {
  if (error->desc != nullptr) { static_cast<ErrorText*>(text)->all += std::string(error->desc) + '\n'; }
  return 0;
}

ErrorText error_text() {
  ErrorText text;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, append_text, &text);
  // A damaged address makes the system call it an invalid argument.
  text.by_system = text.all.find("error message = '") != std::string::npos &&
                   text.all.find(fmt::format("'{}'", system_message(EINVAL))) == std::string::npos;
  return text;
}

/// Whether HDF5 met a version number that it does not know.
bool speaks_of_version(std::string_view text) {
  constexpr std::array<std::string_view, 6> kMarks{"bad version number",    "bad superblock version",       "wrong version number",
                                                   "version out of bounds", "object header version number", "unknown message flags"};
  for (const std::string_view mark : kMarks) {
    if (text.find(mark) != std::string_view::npos) { return true; }
  }
  return false;
}

}  // namespace

void refuse_unreadable(const std::string& what) {
  const ErrorText text = error_text();
  const std::string reason = innermost_hdf5_error();
  if (text.by_system) { throw RuntimeFailure(fmt::format("{} cannot be read: {}", what, reason)); }
  ANNULUS_EXPECTS(!speaks_of_version(text.all),
                  "{} is of a newer format than HDF5 {}.{}.{} of this program reads ({}); write it for that version, with h5py by "
                  "libver=('earliest', 'v110')",
                  what, H5_VERS_MAJOR, H5_VERS_MINOR, H5_VERS_RELEASE, reason);
  ANNULUS_EXPECTS(text.all.find("already open for") == std::string::npos,
                  "{} is marked as open for writing: its writer still works on it or has died; h5clear -s removes the mark", what);
  throw InvalidArgument(fmt::format("{} is damaged: {}", what, reason));
}

ReadableFile::ReadableFile(const std::string& what, const std::string& path)
    : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  ANNULUS_EXPECTS(descriptor_ >= 0, "{}: {}", what, system_message(errno));
  try {
    struct stat status{};
    ANNULUS_EXPECTS(::fstat(descriptor_, &status) == 0, "{}: {}", what, system_message(errno));
    ANNULUS_EXPECTS(S_ISREG(status.st_mode), "{} is {}, not a regular file", what,
                    S_ISDIR(status.st_mode) ? "a folder" : "a device, pipe or socket");
    state_ = {status.st_dev, status.st_ino, status.st_size, status.st_mtim.tv_sec, status.st_mtim.tv_nsec};
    lock_shared(what, descriptor_);
    const Hdf5Lock lock;
    leave_locks_to_us();
    const htri_t is_hdf5 = H5Fis_hdf5(path.c_str());
    if (is_hdf5 < 0) { refuse_unreadable(what); }
    ANNULUS_EXPECTS(is_hdf5 > 0, "{} is not an HDF5 file", what);
    file_ = Hdf5Handle(H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT));
    if (!file_) { refuse_unreadable(what); }
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

ReadableFile::~ReadableFile() {
  file_.reset();
  ::close(descriptor_);
}

}  // namespace annulus
