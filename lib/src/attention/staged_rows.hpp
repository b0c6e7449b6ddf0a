// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/device/device.hpp>
#include <annulus/job/watchdog.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus {

/// Host memory that rows pass through on their way to a device.
inline constexpr std::int64_t kStagedBytes = std::int64_t{8} << 20;

/// Reads `count` rows of row_bytes each to `target` in memory of the device, some at a time: straight to their place where that is the
/// host's, else through host memory. Returns when they are in place.
/// @param read      read(first, rows, out) of those rows
/// @param together  together(first, most): how many rows from `first` on are best read at a time to the host; `most` where that is all one
template <class Read, class Together>
void read_staged(Device& device, Queue& queue, Watchdog& watchdog, std::byte* target, std::int64_t count, std::int64_t row_bytes,
                 Read&& read, Together&& together) {
  const std::int64_t most = std::max<std::int64_t>(1, kStagedBytes / row_bytes);
  std::vector<std::byte> staging(device.host_memory() ? 0 : static_cast<std::size_t>(std::min(most, count) * row_bytes));
  for (std::int64_t done = 0, part = 0; done < count; done += part) {
    if (device.host_memory()) {
      part = std::min(count - done, together(done, most));
      read(done, part, target + done * row_bytes);
    } else {
      part = std::min(count - done, most);
      read(done, part, staging.data());
      device.upload(queue, target + done * row_bytes, staging.data(), part * row_bytes);
      queue.synchronize();
    }
    watchdog.progress();
  }
}

}  // namespace annulus
