// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hdf5_handle.hpp"

#include <cstdint>
#include <string>

namespace annulus {

/// The place of a result that is being written: a temporary name beside it, .<name>.partial-<pid>-<n>, which publish() turns into the
/// result. Without publish() the destructor removes what is there, and so does remove_unfinished_results().
class UnfinishedPath {
 public:
  /// Creates nothing. A symbolic link at `path` is followed, so that its target is what is replaced.
  /// @throws InvalidArgument as check_result_path()
  UnfinishedPath(const std::string& path, bool force);
  ~UnfinishedPath();
  UnfinishedPath(const UnfinishedPath&) = delete;
  UnfinishedPath& operator=(const UnfinishedPath&) = delete;

  const std::string& temporary() const noexcept { return temporary_; }
  /// For messages: "result file 'o.h5'".
  std::string describe() const;
  /// Syncs the temporary file, which must be closed, and renames it.
  /// @throws RuntimeFailure if the disk refuses, InvalidArgument if another file took the place and not `force`
  void publish();
  /// Unlinks the temporary file; nothing can be published after it.
  void discard() noexcept;

 private:
  std::string shown_path_;  ///< as the user wrote it
  std::string path_;        ///< absolute, links resolved
  std::string temporary_;
  bool force_;
  bool finished_ = false;
  int slot_ = -1;  ///< in the table of remove_unfinished_results()
};

/// An HDF5 file on its way to `path`. Without commit() the destructor removes it. Close all handles into it before either.
class UnfinishedFile {
 public:
  /// Creates the temporary file.
  /// @throws InvalidArgument as check_result_path(), RuntimeFailure if the file cannot be created
  UnfinishedFile(const std::string& path, bool force);
  ~UnfinishedFile();
  UnfinishedFile(const UnfinishedFile&) = delete;
  UnfinishedFile& operator=(const UnfinishedFile&) = delete;

  hid_t get() const noexcept { return file_.get(); }
  std::string describe() const { return place_.describe(); }

  /// Writes what HDF5 holds back and takes the disk blocks of everything allocated so far, so that a full disk is found before hours of
  /// work. File systems without such a call are taken at their word. @throws RuntimeFailure if there is no room
  void reserve_allocated();

  /// Closes, syncs, renames. @throws RuntimeFailure if the disk refuses, InvalidArgument if another file took the place and not `force`
  void commit();

 private:
  UnfinishedPath place_;
  Hdf5Handle file_;
};

}  // namespace annulus
