// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hdf5_handle.hpp"

#include <cstdint>
#include <string>

namespace annulus {

/// An HDF5 file on its way to `path`: it is written as .<name>.partial-<pid>-<n> in the same folder and takes its name in commit().
/// Without commit the destructor removes it. Close all handles into it before either.
class UnfinishedFile {
 public:
  /// Creates the temporary file. A symbolic link at `path` is followed, so that its target is what is replaced.
  /// @throws InvalidArgument as check_result_path(), RuntimeFailure if the file cannot be created
  UnfinishedFile(const std::string& path, bool force);
  ~UnfinishedFile();
  UnfinishedFile(const UnfinishedFile&) = delete;
  UnfinishedFile& operator=(const UnfinishedFile&) = delete;

  hid_t get() const noexcept { return file_.get(); }
  /// For messages: "result file 'o.h5'".
  std::string describe() const;

  /// Writes what HDF5 holds back and takes the disk blocks of everything allocated so far, so that a full disk is found before hours of
  /// work. File systems without such a call are taken at their word. @throws RuntimeFailure if there is no room
  void reserve_allocated();

  /// Closes, syncs, renames. @throws RuntimeFailure if the disk refuses, InvalidArgument if another file took the place and not `force`
  void commit();

 private:
  void remove_temporary() noexcept;

  std::string shown_path_;  ///< as the user wrote it
  std::string path_;        ///< absolute, links resolved
  std::string temporary_;
  bool force_;
  bool finished_ = false;
  int slot_ = -1;  ///< in the table of remove_unfinished_results()
  Hdf5Handle file_;
};

}  // namespace annulus
