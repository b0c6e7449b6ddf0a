// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hdf5_handle.hpp"

#include <cstdint>
#include <string>
#include <sys/types.h>

namespace annulus {

/// What tells whether a file is the one it was: a writer changes its time or its size.
struct FileState {
  dev_t device = 0;
  ino_t inode = 0;
  off_t bytes = 0;
  std::int64_t changed_s = 0;
  std::int64_t changed_ns = 0;

  bool operator==(const FileState&) const = default;
};

/// An HDF5 file that is open for reading. It holds a shared lock where the file system has locks, and none where it has none: the lock is
/// this object's and not HDF5's, which on a file system without locks gives up, and where it opens files by itself (the parts of virtual
/// datasets) reads zeros instead.
class ReadableFile {
 public:
  /// `what` begins every message: "input file 'x.h5'".
  /// @throws InvalidArgument with the system's reason if `path` is not a readable regular file; else saying which of four it is: not HDF5,
  /// held by a writer (or a lock that the environment insists on and the file system refuses, with what to set), of a newer format than
  /// this HDF5 reads, or damaged
  ReadableFile(const std::string& what, const std::string& path);
  ~ReadableFile();
  ReadableFile(const ReadableFile&) = delete;
  ReadableFile& operator=(const ReadableFile&) = delete;

  hid_t get() const noexcept { return file_.get(); }
  /// When it was opened.
  const FileState& state() const noexcept { return state_; }

 private:
  int descriptor_;  ///< holds the lock
  FileState state_;
  Hdf5Handle file_;
};

/// The refusal that fits HDF5's latest error: `what` is of a newer format, or damaged, with HDF5's innermost words.
/// For failures that the system caused (a disk that does not read) a RuntimeFailure; hence it throws rather than returns.
[[noreturn]] void refuse_unreadable(const std::string& what);

}  // namespace annulus
