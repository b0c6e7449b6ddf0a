// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/watchdog.hpp>

#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>

using namespace annulus;
using annulus::test::world;
using namespace std::chrono_literals;

namespace {

/// Longer than ranks on a busy machine are apart, and short for a test.
constexpr double kTimeoutSeconds = 1.0;

/// A watchdog of all ranks whose abort is only noted.
class NotingWatchdog {
 public:
  explicit NotingWatchdog(double timeout_s)
      : watchdog_(std::make_unique<Watchdog>(MPI_COMM_WORLD, timeout_s, "here", [this](std::string_view message) { note(message); })) {}
  Watchdog& get() { return *watchdog_; }
  /// Ends the watchdog. @returns what it would have aborted with, or nothing
  std::string end() {
    watchdog_.reset();
    const std::scoped_lock lock(mutex_);
    return message_;
  }

 private:
  void note(std::string_view message) {
    const std::scoped_lock lock(mutex_);
    if (!message_.empty()) { return; }
    message_ = message;
    throw std::runtime_error("noted");  // the watchdog's thread passes it to this function again, and ends
  }

  std::mutex mutex_;
  std::string message_;
  std::unique_ptr<Watchdog> watchdog_;
};

/// Calls `work` until the time is over.
template <class Work>
void for_a_while(std::chrono::milliseconds time, Work&& work) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
    work();
    std::this_thread::sleep_for(10ms);
  }
}

}  // namespace

TEST_CASE("a watchdog says what is waited for, with step, peer and bytes as far as they are known") {
  Watchdog watchdog;
  CHECK(watchdog.describe().empty());
  watchdog.set_step(3);
  CHECK(watchdog.describe() == "step 3: ");
  {
    const Watchdog::Wait wait = watchdog.waiting("messages", 2, 8192);
    CHECK(watchdog.describe() == "step 3: messages with rank 2 (8192 bytes): ");
    const Watchdog::Wait inner = watchdog.waiting("agreement");
    CHECK(watchdog.describe() == "step 3: messages with rank 2 (8192 bytes): ");
  }
  CHECK(watchdog.describe() == "step 3: ");
  watchdog.set_step(-1);
  const Watchdog::Wait wait = watchdog.waiting("barrier");
  CHECK(watchdog.describe() == "barrier: ");
}

TEST_CASE("a wait that ends does not take the words of one that goes on") {
  Watchdog watchdog;
  std::optional<Watchdog::Wait> first = watchdog.waiting("the first", 1, 100, 4);
  const Watchdog::Wait second = watchdog.waiting("the second", 2, 200, 5);
  CHECK(watchdog.describe() == "step 4: the first with rank 1 (100 bytes): ");
  first.reset();
  CHECK(watchdog.describe() == "step 5: the second with rank 2 (200 bytes): ");
}

TEST_CASE("waits of two threads leave nothing behind") {
  Watchdog watchdog;
  const auto waits = [&](const char* operation, std::int64_t step) {
    for (int i = 0; i < 2000; ++i) {
      const Watchdog::Wait wait = watchdog.waiting(operation, 1, 1, step);
      const std::string text = watchdog.describe();
      if (text != "step 1: host with rank 1 (1 bytes): " && text != "step 2: ledger with rank 1 (1 bytes): ") { return text; }
    }
    return std::string();
  };
  std::string other;
  {
    const std::jthread thread([&] { other = waits("ledger", 2); });
    CHECK(waits("host", 1).empty());
  }
  CHECK(other.empty());
  CHECK(watchdog.describe().empty());
}

TEST_CASE("a wait counts as progress only when nothing is waited for yet") {
  Watchdog watchdog;
  const auto count = [&] { return watchdog.progress_counter().load(); };
  const std::uint64_t start = count();
  const Watchdog::Wait outer = watchdog.waiting("outer");
  CHECK(count() == start + 1);
  const Watchdog::Wait inner = watchdog.waiting("inner");
  CHECK(count() == start + 1);
  const Watchdog::Wait exposed = watchdog.exposed();
  CHECK(count() == start + 2);
}

TEST_CASE("a rank that works and says so is not hung, however long others wait for it") {
  // Without its progress rank 0 would be ended after ten rounds of half a timeout.
  NotingWatchdog watchdog(kTimeoutSeconds);
  if (world().rank() == 0) {
    for_a_while(6500ms, [&] { watchdog.get().progress(); });
    world().barrier();
  } else {
    const Watchdog::Wait wait = watchdog.get().waiting("rank 0", 0);
    world().barrier();
  }
  CHECK(watchdog.end() == "");
}

TEST_CASE("a rank that asks the others just when all come to the end takes no answer for an end") {
  // The others ask after half the timeout; rank 0 comes to the end at the same time, a little before or after.
  constexpr double kShort = 0.2;
  for (int millisecond = 90; millisecond < 130; millisecond += 2) {
    NotingWatchdog watchdog(kShort);
    {
      std::optional<Watchdog::Wait> wait;
      if (world().rank() == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(millisecond));
      } else {
        wait.emplace(watchdog.get().waiting("rank 0", 0));
      }
      world().barrier();
    }
    CHECK(watchdog.end() == "");
  }
}

TEST_CASE("ranks that compute with transfers open harm nobody") {
  NotingWatchdog watchdog(kTimeoutSeconds);
  {
    const Watchdog::Wait exposed = watchdog.get().exposed();
    std::this_thread::sleep_for(1500ms);
  }
  CHECK(watchdog.end() == "");
}

TEST_CASE("a timeout of zero never ends a job") {
  NotingWatchdog watchdog(0);
  {
    const Watchdog::Wait wait = watchdog.get().waiting("for ever");
    std::this_thread::sleep_for(500ms);
  }
  CHECK(watchdog.end() == "");
}
