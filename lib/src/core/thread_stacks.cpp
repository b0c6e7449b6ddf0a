// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/thread_stacks.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <pthread.h>

namespace annulus {

namespace {

/// Kernels were seen to overrun 128 KiB, where the product library generates code; libraries of other versions may take more.
constexpr std::size_t kLeastBytes = std::size_t{512} << 10U;

/// Of the calling thread; "no limit" if the system does not say.
std::size_t stack_bytes() {
  std::size_t bytes = std::numeric_limits<std::size_t>::max();
  pthread_attr_t attributes;
  if (::pthread_getattr_np(::pthread_self(), &attributes) != 0) { return bytes; }
  ::pthread_attr_getstacksize(&attributes, &bytes);
  ::pthread_attr_destroy(&attributes);
  return bytes;
}

}  // namespace

void require_thread_stacks(int threads) {
  std::size_t smallest = stack_bytes();
#pragma omp parallel num_threads(threads) reduction(min : smallest)
  smallest = std::min(smallest, stack_bytes());
  const char* setting = std::getenv("OMP_STACKSIZE");
  ANNULUS_EXPECTS(smallest >= kLeastBytes, "a thread has a stack of {} KiB and needs {} KiB; it is set by OMP_STACKSIZE ({}) and ulimit -s",
                  smallest >> 10U, kLeastBytes >> 10U, setting == nullptr ? "not set" : setting);
}

}  // namespace annulus
