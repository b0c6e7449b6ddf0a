// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/affinity.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <sched.h>
#include <system_error>

namespace annulus {

CpuMask allowed_cpus(const AskAffinity& ask) {
  const auto ask_system = [](std::size_t bytes, void* mask) {
    return ::sched_getaffinity(0, bytes, static_cast<cpu_set_t*>(mask)) == 0 ? 0 : errno;
  };
  constexpr std::size_t kFirstWords = 1024 / 64;             // what glibc's cpu_set_t holds, and most kernels
  constexpr std::size_t kMostWords = std::size_t{1} << 16U;  // 4 Mi CPUs: no kernel has more
  for (std::size_t words = kFirstWords;; words *= 2) {
    CpuMask mask(words, 0);
    const std::size_t bytes = words * sizeof(std::uint64_t);
    const int error = ask ? ask(bytes, mask.data()) : ask_system(bytes, mask.data());
    if (error == 0) { return mask; }
    if (error != EINVAL || words >= kMostWords) {
      throw RuntimeFailure(fmt::format("the system does not say which CPUs this process may use: {}; --threads takes a number",
                                       std::generic_category().message(error)));
    }
  }
}

std::int64_t count_of(const CpuMask& mask) {
  std::int64_t count = 0;
  for (const std::uint64_t word : mask) { count += std::popcount(word); }
  return count;
}

bool overlap(const CpuMask& a, const CpuMask& b) {
  for (std::size_t word = 0; word < std::min(a.size(), b.size()); ++word) {
    if ((a[word] & b[word]) != 0) { return true; }
  }
  return false;
}

}  // namespace annulus
