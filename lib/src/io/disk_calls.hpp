// SPDX-License-Identifier: Apache-2.0
// System calls on files that not every file system has, with what takes their place. Each returns 0 or an errno.
#pragma once

#include <cstdint>
#include <string>

namespace annulus {

/// Whether an errno says that there is no room: no space, quota, the limit on a file's size.
bool means_no_room(int error);

/// Takes the blocks of the first `bytes` bytes of an open file, whose size stays. Advice: only "no room" is an error. Where the file system
/// cannot reserve, its free space and the process's limit are asked instead.
int reserve_blocks(int descriptor, std::int64_t bytes);

/// Sends an open file, or a folder, to the disk. Advice where the file system does not do that; what it says of lost data is an error.
int sync_file(int descriptor);
int sync_folder(const std::string& path);

/// Renames without replacing an existing file (EEXIST). Where a file system has neither an exclusive rename nor links: checks, then
/// renames.
int rename_to_absent(const char* from, const char* to);

}  // namespace annulus
