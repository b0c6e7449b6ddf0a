// SPDX-License-Identifier: Apache-2.0
// The files that this process has created and not finished, as a signal handler must find them: a static table, since handlers may neither
// allocate nor lock. remove_unfinished_results() (annulus/io/result_file.hpp) empties it.
#pragma once

#include <string>
#include <sys/types.h>

namespace annulus {

/// A file by what it is, whatever names it has.
struct FileId {
  dev_t device = 0;
  ino_t inode = 0;
  bool operator==(const FileId&) const = default;
};

/// Enters a file that this process has just created. `path` is absolute and shorter than PATH_MAX.
/// @return its place in the table
int enter_unfinished(const std::string& path, FileId file);

/// Says that the file is complete: remove_unfinished_results() then leaves it and names it on standard error.
void mark_complete(int place) noexcept;

/// Says that a later process goes on with the file: remove_unfinished_results() then leaves it, too, and names it.
void mark_resumable(int place) noexcept;

/// Takes an entry out; its file is nobody's to remove any more.
void leave_unfinished(int place) noexcept;

/// Whether `path` is `file` itself, and not another that has taken its name. Async-signal-safe.
bool is_file(const char* path, FileId file) noexcept;

/// Unlinks `path` if it is `file` itself, and not another that has taken its name. Async-signal-safe.
void unlink_own(const char* path, FileId file) noexcept;

}  // namespace annulus
