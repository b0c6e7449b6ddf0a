// SPDX-License-Identifier: Apache-2.0
#include "result_place.hpp"

#include <annulus/core/error.hpp>
#include <annulus/io/result_file.hpp>

#include <cerrno>
#include <fcntl.h>
#include <filesystem>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

namespace annulus {

namespace {

/// Bits of STATX_ATTR_* that the file system says the file has; none where it or the kernel does not say.
std::uint64_t attributes_of(const char* path) {
  struct statx status{};
  if (::statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, 0, &status) != 0) { return 0; }
  return status.stx_attributes & status.stx_attributes_mask;
}

/// What rename(2) would say at the end of the work about the file to be replaced, said now.
void require_replaceable(const std::string& shown, const std::string& target, const struct stat& file, const struct stat& folder) {
  const std::uint64_t attributes = attributes_of(target.c_str());
  constexpr std::uint64_t kMountPoint = 0x2000;  // STATX_ATTR_MOUNT_ROOT, which older C libraries do not name
  ANNULUS_EXPECTS((attributes & kMountPoint) == 0 && file.st_dev == folder.st_dev,
                  "result file '{}' is a mount point and cannot be replaced; mount its folder and name a file in it", shown);
  ANNULUS_EXPECTS((attributes & (STATX_ATTR_IMMUTABLE | STATX_ATTR_APPEND)) == 0,
                  "result file '{}' is marked immutable or append-only and cannot be replaced", shown);
  const bool may_replace =
      (folder.st_mode & S_ISVTX) == 0 || ::geteuid() == 0 || file.st_uid == ::geteuid() || folder.st_uid == ::geteuid();
  ANNULUS_EXPECTS(may_replace, "result file '{}' belongs to another user (uid {}), and in its folder (sticky bit) only they may replace it",
                  shown, file.st_uid);
}

}  // namespace

std::string system_message(int error) { return std::generic_category().message(error); }

ResultPlace resolve_result_place(const std::string& path, bool force) {
  namespace fs = std::filesystem;
  ANNULUS_EXPECTS(!path.empty(), "the result file's name is empty");
  ANNULUS_EXPECTS(path.back() != '/', "result file '{}' names a folder", path);
  std::error_code error;
  fs::path target = fs::absolute(path, error);
  ANNULUS_EXPECTS(!error, "result file '{}': {}", path, error.message());

  struct stat file{};
  if (::lstat(target.c_str(), &file) == 0 && S_ISLNK(file.st_mode)) {
    target = fs::canonical(target, error);
    ANNULUS_EXPECTS(!error, "result file '{}' is a symbolic link that leads nowhere: {}", path, error.message());
  }
  ResultPlace place{target.string(), ::stat(target.c_str(), &file) == 0, 0};
  if (place.replaces) {
    ANNULUS_EXPECTS(!S_ISDIR(file.st_mode), "result file '{}' is a folder", path);
    ANNULUS_EXPECTS(S_ISREG(file.st_mode), "result file '{}' is a device, pipe or socket, not a regular file", path);
    ANNULUS_EXPECTS(force, "result file '{}' exists; --force replaces it", path);
    place.mode = file.st_mode & 07777U;
  } else {
    const int reason = errno;
    ANNULUS_EXPECTS(reason == ENOENT, "result file '{}': {}", path, system_message(reason));
  }
  const fs::path parent = target.parent_path();
  struct stat folder{};
  ANNULUS_EXPECTS(::stat(parent.c_str(), &folder) == 0, "result file '{}': folder '{}': {}", path, parent.string(), system_message(errno));
  ANNULUS_EXPECTS(S_ISDIR(folder.st_mode), "result file '{}': '{}' is not a folder", path, parent.string());
  ANNULUS_EXPECTS(::access(parent.c_str(), W_OK | X_OK) == 0, "result file '{}': folder '{}' cannot be written: {}", path, parent.string(),
                  system_message(errno));
  ANNULUS_EXPECTS((attributes_of(parent.c_str()) & (STATX_ATTR_IMMUTABLE | STATX_ATTR_APPEND)) == 0,
                  "result file '{}': folder '{}' is marked immutable or append-only: nothing in it can be renamed", path, parent.string());
  if (place.replaces) { require_replaceable(path, place.path, file, folder); }
  return place;
}

void check_result_path(const std::string& path, bool force) { resolve_result_place(path, force); }

}  // namespace annulus
