// SPDX-License-Identifier: Apache-2.0
// Threads of the checker: of the language's own, so that it shares no run-time with what it checks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace annulus {

/// Calls body(worker, index) for every index < count on at most `threads` threads, worker < threads. An exception of any call is thrown
/// here, after all threads have ended.
template <class Body>
void for_each_parallel(std::int64_t count, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto work = [&](std::int64_t worker) {
    try {
      for (std::int64_t index = next++; index < count; index = next++) { body(worker, index); }
    } catch (...) {
      next = count;
      const std::scoped_lock lock(failure_mutex);
      if (!failure) { failure = std::current_exception(); }
    }
  };
  {
    std::vector<std::jthread> helpers;
    for (std::int64_t worker = 1; worker < std::min<std::int64_t>(threads, count); ++worker) {
      try {
        helpers.emplace_back(work, worker);
      } catch (const std::system_error&) {
        break;  // a limit on threads makes it slower, not wrong
      }
    }
    work(0);
  }
  if (failure) { std::rethrow_exception(failure); }
}

}  // namespace annulus
