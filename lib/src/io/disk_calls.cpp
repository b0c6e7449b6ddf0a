// SPDX-License-Identifier: Apache-2.0
#include "disk_calls.hpp"

#include <cerrno>
#include <cstdio>
#include <fcntl.h>
#include <limits>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

namespace annulus {

namespace {

/// fsync() repeated over interrupts; its errno.
int sync_descriptor(int descriptor) {
  while (::fsync(descriptor) != 0) {
    if (errno != EINTR) { return errno; }
  }
  return 0;
}

/// What can be known of room where nothing can be reserved.
int look_for_room(int descriptor, std::int64_t bytes) {
  struct stat file{};
  struct statvfs disk{};
  if (::fstat(descriptor, &file) != 0 || ::fstatvfs(descriptor, &disk) != 0) { return 0; }
  if (disk.f_blocks == 0) { return 0; }  // so say file systems that tell no sizes (some network mounts)
  const auto wanted = static_cast<double>(bytes) - 512.0 * static_cast<double>(file.st_blocks);
  return wanted > static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize) ? ENOSPC : 0;
}

}  // namespace

bool means_no_room(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

int reserve_blocks(int descriptor, std::int64_t bytes) {
  if (bytes <= 0) { return 0; }
  // The limit is on a file's size, which reserving does not change.
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && static_cast<rlim_t>(bytes) > limit.rlim_cur) {
    return EFBIG;
  }
  int error = 0;
  do { error = ::fallocate(descriptor, FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno; } while (error == EINTR);
  if (error == 0 || means_no_room(error)) { return error; }
  return look_for_room(descriptor, bytes);
}

int sync_file(int descriptor) {
  const int error = sync_descriptor(descriptor);
  return means_no_room(error) || error == EIO ? error : 0;
}

int sync_folder(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) { return 0; }  // a folder may be written and not read
  const int error = sync_file(descriptor);
  ::close(descriptor);
  return error;
}

int rename_to_absent(const char* from, const char* to) {
  if (::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) { return 0; }
  if (errno == EEXIST) { return EEXIST; }
  // Network file systems lack the flag, each with an errno of its own; a hard link refuses an existing name just as well.
  if (::link(from, to) == 0) {
    ::unlink(from);  // a second name that stays does no harm
    return 0;
  }
  if (errno == EEXIST) { return EEXIST; }
  struct stat status{};
  if (::lstat(to, &status) == 0) { return EEXIST; }
  return ::rename(from, to) == 0 ? 0 : errno;
}

}  // namespace annulus
