// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/error.hpp>

#include "result_place.hpp"
#include "unfinished_table.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace annulus {

/// A file that an earlier process left to be gone on with.
struct ResumableFile {
  std::string path;
};

/// A result that is being written: a temporary file in the folder of its place, which publish() turns into the result. It is created
/// exclusively as .<name>.partial-<16 random digits>, and nothing but what was created is ever removed: by the destructor without
/// publish(), and by remove_unfinished_results(). After lose_name() it has no name until publish(), so that no end of the process, kill -9
/// and a launcher's haste among them, leaves anything behind.
class UnfinishedPath {
 public:
  /// Creates the temporary file, empty. A symbolic link at `path` is followed, so that its target is what is replaced.
  /// @throws InvalidArgument as check_result_path(), or if the file cannot be created
  UnfinishedPath(const std::string& path, bool force);
  /// Goes on with `file`, which is never removed: publish() turns it into the result, and until then every end of the process leaves it.
  /// No other process can go on with it meanwhile, where the file system has locks.
  /// @throws InvalidArgument as check_result_path(), or if the file cannot be opened or is in use
  UnfinishedPath(const std::string& path, bool force, const ResumableFile& file);
  ~UnfinishedPath();
  UnfinishedPath(const UnfinishedPath&) = delete;
  UnfinishedPath& operator=(const UnfinishedPath&) = delete;

  /// Sends what is written to the disk. @throws RuntimeFailure
  void sync() const;

  /// While it has a name.
  const std::string& temporary() const noexcept { return temporary_; }
  /// Of the temporary file, for reading and writing.
  int descriptor() const noexcept { return descriptor_; }
  /// For messages: "result file 'o.h5'".
  std::string describe() const;

  /// Takes the disk's blocks for `bytes` bytes, so that a full disk is found before hours of work. @throws RuntimeFailure if there is no
  /// room
  void reserve(std::int64_t bytes) const;

  /// Takes the temporary file's name away where the file system can do without (O_TMPFILE), else nothing. What is written is kept.
  /// @param opened  a descriptor of the temporary file that somebody else writes through, or -1; goes on as one of the nameless file
  void lose_name(int opened = -1);

  /// Makes the temporary file empty and gives it a name again, if it has lost it. @throws RuntimeFailure if that cannot be
  void restart();

  /// Syncs the complete temporary file and renames it. One that replaces another takes over its mode, and its owner where that is allowed.
  /// @throws RuntimeFailure if that cannot be, or if another program took the place meanwhile and not `force`: the complete file is then
  /// kept, and named
  void publish();

  /// After publish(): a new temporary file, which publish() puts in the place of the one published before, and of no other's without
  /// `force`. @throws RuntimeFailure if it cannot be created
  void renew();

 private:
  int create();
  int link_to_name();
  void take_name();
  mode_t first_mode() const noexcept { return place_.replaces ? 0600 : 0666; }
  void adopt_replaced() const noexcept;
  int move_into_place() const noexcept;
  [[noreturn]] void keep(const std::string& what);

  std::string shown_path_;  ///< as the user wrote it
  bool force_;
  ResultPlace place_;
  std::string temporary_;
  bool resumable_ = false;
  int descriptor_ = -1;
  int lost_descriptor_ =
      -1;          ///< of the file that had the name: while it is open its inode, by which HDF5 tells files apart, is nobody else's
  int slot_ = -1;  ///< in the table of unfinished files; -1: no temporary file has a name
  FileId file_;
  std::optional<FileId> published_;
  int published_descriptor_ = -1;  ///< stays open, or another file could get the inode
};

/// Runs what prepares a result before any work: a disk that refuses then is something that the user can mend.
/// @throws InvalidArgument for RuntimeFailure
template <class Body>
auto before_work(Body&& body) {
  try {
    return std::forward<Body>(body)();
  } catch (const RuntimeFailure& error) { throw InvalidArgument(error.what()); }
}

}  // namespace annulus
