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

/// A result that is being written: a temporary file beside its place, .<name>.partial-<16 random digits>, which publish() turns into the
/// result. It is created exclusively, and nothing but what was created is ever removed: by the destructor without publish(), and by
/// remove_unfinished_results().
class UnfinishedPath {
 public:
  /// Creates the temporary file, empty. A symbolic link at `path` is followed, so that its target is what is replaced.
  /// @throws InvalidArgument as check_result_path(), or if the file cannot be created
  UnfinishedPath(const std::string& path, bool force);
  ~UnfinishedPath();
  UnfinishedPath(const UnfinishedPath&) = delete;
  UnfinishedPath& operator=(const UnfinishedPath&) = delete;

  const std::string& temporary() const noexcept { return temporary_; }
  /// Of the temporary file, for reading and writing.
  int descriptor() const noexcept { return descriptor_; }
  /// For messages: "result file 'o.h5'".
  std::string describe() const;

  /// Takes the disk's blocks for `bytes` bytes, so that a full disk is found before hours of work. @throws RuntimeFailure if there is no
  /// room
  void reserve(std::int64_t bytes) const;

  /// Syncs the complete temporary file and renames it. One that replaces another takes over its mode, and its owner where that is allowed.
  /// @throws RuntimeFailure if that cannot be, or if another program took the place meanwhile and not `force`: the complete file is then
  /// kept, and named
  void publish();

  /// After publish(): a new temporary file, which publish() puts in the place of the one published before, and of no other's without
  /// `force`. @throws RuntimeFailure if it cannot be created
  void renew();

 private:
  int create();
  void adopt_replaced() const noexcept;
  int move_into_place() const noexcept;
  [[noreturn]] void keep(const std::string& what);

  std::string shown_path_;  ///< as the user wrote it
  bool force_;
  ResultPlace place_;
  std::string temporary_;
  int descriptor_ = -1;
  int slot_ = -1;  ///< in the table of unfinished files; -1: there is no temporary file
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
