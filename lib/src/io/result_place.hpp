// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <sys/types.h>

namespace annulus {

/// Where a result lies once it is finished.
struct ResultPlace {
  std::string path;  ///< absolute, and behind a symbolic link if the user named one
  bool replaces = false;
  mode_t mode = 0;  ///< of the file that is replaced
};

/// Finds the place that the user's `path` names, and refuses one where no result could be put: a folder, a device, an existing file without
/// `force`, a file that cannot be replaced (another user's in a sticky folder, an immutable one, a mount point), a folder that cannot be
/// written.
/// @throws InvalidArgument
ResultPlace resolve_result_place(const std::string& path, bool force);

/// The system's words for an errno.
std::string system_message(int error);

}  // namespace annulus
