// SPDX-License-Identifier: Apache-2.0
#include "host_memory.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>
#include <unistd.h>

namespace annulus {
namespace {

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

/// The number that a file consists of, or `otherwise` ("max", or no such file).
std::int64_t number_in(const std::string& path, std::int64_t otherwise) {
  std::ifstream file(path);
  std::int64_t number = 0;
  return file >> number ? number : otherwise;
}

/// The number behind `key` in a file of lines "key number ...".
std::int64_t number_of(const std::string& path, const std::string& key, std::int64_t otherwise) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key + " ")) { return std::strtoll(line.c_str() + key.size(), nullptr, 10); }
  }
  return otherwise;
}

/// Where a version of control groups keeps its numbers.
struct GroupFiles {
  std::string mount;
  std::string limit;
  std::string usage;
  std::string reclaimable;  ///< key in memory.stat: cached files, which count as usage but give way
};

/// What the group at `path` and its ancestors leave. Inside a container `path` may be the host's name for the group; then only the mount's
/// root exists, which is the container's own.
std::int64_t left_by_groups(const GroupFiles& files, std::string path) {
  std::int64_t left = kUnlimited;
  while (true) {
    const std::string folder = files.mount + path + "/";
    const std::int64_t limit = number_in(folder + files.limit, kUnlimited);
    if (limit != kUnlimited) {
      const std::int64_t used = number_in(folder + files.usage, 0) - number_of(folder + "memory.stat", files.reclaimable, 0);
      left = std::min(left, std::max<std::int64_t>(limit - used, 0));
    }
    if (path.empty()) { return left; }
    path.resize(path.find_last_of('/'));
  }
}

}  // namespace

std::int64_t available_host_memory() {
  constexpr std::int64_t kKibibyte = 1024;
  const std::int64_t physical = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::int64_t>(sysconf(_SC_PAGE_SIZE));
  std::int64_t available = number_of("/proc/meminfo", "MemAvailable:", physical / kKibibyte) * kKibibyte;

  // Lines are "hierarchy:controllers:path"; version 2 has hierarchy 0 and no controllers.
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) { continue; }
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1) == "/" ? "" : line.substr(second + 1);
    if (controllers.empty()) {
      available = std::min(available, left_by_groups({"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"}, path));
    } else if (controllers == "memory") {
      available = std::min(
          available,
          left_by_groups({"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"}, path));
    }
  }
  return available;
}

}  // namespace annulus
