// SPDX-License-Identifier: Apache-2.0
// Which file a name means, so that no file is written that is also read, whatever names and links lead to it.
#pragma once

#include <string>
#include <sys/types.h>
#include <vector>

namespace annulus {

/// A file by device and inode, links followed; one that does not exist yet by its folder's and its own name.
struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  std::string absent_name;  ///< empty: the file exists; with device 0, inode 0: the folder does not exist either, and this is the path

  bool operator==(const FileIdentity&) const = default;
};

/// The identity of what `path` names now. Never fails: a path that leads nowhere is its own identity.
FileIdentity identify_file(const std::string& path);

/// What is done with a file. `printed`: it is where standard output or standard error go.
enum class FileUse { read, written, printed };

/// A file and why it is one: role is "--input", "preset", "standard output".
struct NamedFile {
  std::string role;
  std::string path;
  FileUse use = FileUse::read;
};

/// Requires that no file is written or printed to that is used in another way too. @throws InvalidArgument with both roles and names
void require_distinct_files(const std::vector<NamedFile>& files);

}  // namespace annulus
