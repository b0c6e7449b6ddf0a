// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/at_abort.hpp>

#include <annulus/core/error.hpp>

#include <array>
#include <atomic>

namespace annulus {

namespace {

// A static table, since whoever aborts may be a signal handler, which neither allocates nor locks.
std::array<std::atomic<AbortHook>, 4> hooks{};
static_assert(std::atomic<AbortHook>::is_always_lock_free);

}  // namespace

void at_abort(AbortHook hook) {
  for (std::atomic<AbortHook>& place : hooks) {
    AbortHook found = nullptr;
    if (place.compare_exchange_strong(found, hook) || found == hook) { return; }
  }
  ANNULUS_ASSERT(false, "more than {} hooks for an abort", hooks.size());
}

void run_abort_hooks() noexcept {
  for (const std::atomic<AbortHook>& place : hooks) {
    if (const AbortHook hook = place.load()) { hook(); }
  }
}

}  // namespace annulus
