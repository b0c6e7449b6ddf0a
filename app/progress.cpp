// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <cstdio>
#include <unistd.h>

namespace annulus::app {

Progress::Progress(bool enabled) : active_(enabled && isatty(STDERR_FILENO) != 0) {}

void Progress::show(std::string_view text) const {
  if (!active_) { return; }
  std::fprintf(stderr, "\r\033[K%.*s", static_cast<int>(text.size()), text.data());
  std::fflush(stderr);
}

}  // namespace annulus::app
