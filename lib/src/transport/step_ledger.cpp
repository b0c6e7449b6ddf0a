// SPDX-License-Identifier: Apache-2.0
#include "step_ledger.hpp"

#include "gpu/cuda_driver.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <utility>

namespace annulus {

namespace {

/// Fine against any timeout in seconds, and nothing against the cost of a core.
constexpr auto kWatchPeriod = std::chrono::milliseconds(2);
constexpr auto kAwaitPeriod = std::chrono::microseconds(20);
/// Looks at a word between two questions to the runtime.
constexpr int kLooksPerQuery = 50;

/// Whether a counter that may wrap has come to `target`.
bool has_reached(std::uint32_t counter, std::uint32_t target) { return static_cast<std::int32_t>(counter - target) >= 0; }

}  // namespace

StepLedger::StepLedger(const Communicator& comm, const char* operation, Counting counting, std::function<void()> check)
    : comm_(comm.share()), operation_(operation), counting_(counting), check_(std::move(check)) {
  void* pinned = nullptr;
  ANNULUS_CUDA(cudaHostAlloc(&pinned, sizeof(Words), cudaHostAllocPortable));
  words_ = new (pinned) Words;
  thread_ = std::thread([this] { watch(); });
}

StepLedger::~StepLedger() {
  {
    const std::scoped_lock lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
  // While unwinding the streams may still write there.
  if (!unwinding_.now()) { static_cast<void>(cudaFreeHost(words_)); }
}

std::uint32_t StepLedger::read(std::uint32_t& word) { return std::atomic_ref(word).load(std::memory_order_acquire); }

StepLedger::Entry& StepLedger::entry(std::int64_t step) {
  ANNULUS_ASSERT(step >= 1, "steps of a transport count from 1, found {}", step);
  while (std::ssize(entries_) <= step) { entries_.emplace_back().step = std::ssize(entries_) - 1; }
  return entries_[static_cast<std::size_t>(step)];
}

void StepLedger::ready(std::int64_t step, cudaStream_t queue) {
  CudaClock& clock = clock_of(queue);
  if (step == 1) { clock.read(origin_, queue); }
  clock.read(entry(step).ready, queue);
}

StepLedger::Entry& StepLedger::open(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  Entry& opened = entry(step);
  opened.number = 0;
  opened.bytes_sent = 0;
  opened.bytes_received = 0;
  opened.begins_used = 0;
  std::int64_t peer = -1;
  for (const Outgoing& message : sends) {
    opened.bytes_sent += message.bytes;
    if (message.bytes > 0) { peer = message.peer; }
  }
  // Who is waited for is rather the peer that a message should come from.
  std::int64_t due = 0;
  for (const Incoming& message : receives) {
    due += message.bytes;
    if (message.bytes > 0) { peer = message.peer; }
  }
  if (opened.bytes_sent == 0 && due == 0) { return opened; }
  if (counting_ == Counting::by_receipts) { receipts_.post(step, sends, receives); }

  opened.number = next_++;
  if (next_ == 0) { next_ = 1; }
  const std::scoped_lock lock(mutex_);
  open_.push_back({opened.number, step, peer, opened.bytes_sent + due});
  if (open_.size() == 1) { changed_.notify_all(); }
  return opened;
}

void StepLedger::begin(Entry& entry, cudaStream_t stream) {
  if (entry.begins_used == entry.begins.size()) { entry.begins.emplace_back(); }
  clock_of(stream).read(entry.begins[entry.begins_used++], stream);
}

void StepLedger::complete(Entry& entry, cudaStream_t stream) {
  CudaClock& clock = clock_of(stream);
  clock.read(entry.done, stream);
  CudaDriver::get().write_word(clock.behind(stream), &words_->completed, entry.number);
}

void StepLedger::mark_waiting(std::int64_t step, cudaStream_t queue) {
  const std::uint32_t number = entry(step).number;
  if (number != 0) { CudaDriver::get().write_word(clock_of(queue).behind(queue), &words_->waiting, number); }
}

void StepLedger::wait(std::int64_t step, cudaStream_t queue) {
  const Entry& waited = entry(step);
  if (waited.number != 0) { ANNULUS_CUDA(cudaStreamWaitEvent(queue, waited.done.passed(), cudaEventWaitDefault)); }
}

StepTraffic StepLedger::traffic(std::int64_t step) {
  const Entry& asked = entry(step);
  if (asked.number == 0) { return {}; }
  await(asked);
  StepTraffic traffic;
  traffic.bytes_sent = asked.bytes_sent;
  traffic.bytes_received = counting_ == Counting::by_receipts ? receipts_.received(step) : asked.bytes_received;
  // The two moments are of two streams, read by two clocks, and may lie closer together than these agree.
  traffic.communication_ms = std::max(0.0, asked.done.ms_since(asked.ready));
  traffic.end_ms = asked.done.ms_since(origin_);
  traffic.begin_ms = asked.begins_used == 0 ? asked.ready.ms_since(origin_) : traffic.end_ms;
  traffic.begin_ms = std::min(traffic.begin_ms, traffic.end_ms);
  for (std::size_t index = 0; index < asked.begins_used; ++index) {
    traffic.begin_ms = std::min(traffic.begin_ms, asked.begins[index].ms_since(origin_));
  }
  return traffic;
}

void StepLedger::drain() {
  const Entry* last = nullptr;
  for (const Entry& candidate : entries_) {
    if (candidate.number != 0 && (last == nullptr || has_reached(candidate.number, last->number))) { last = &candidate; }
  }
  if (last != nullptr) { await(*last); }
  receipts_.drain();
}

CudaClock& StepLedger::clock_of(cudaStream_t stream) {
  const std::scoped_lock lock(mutex_);
  return clocks_[stream];
}

void StepLedger::await(const Entry& entry) {
  for (int look = 1; !has_reached(read(words_->completed), entry.number); ++look) {
    if (look % kLooksPerQuery == 0) {
      static_cast<void>(is_reached(entry.done.passed()));  // throws what has failed
      const std::scoped_lock lock(mutex_);
      if (failure_) { std::rethrow_exception(failure_); }
    }
    std::this_thread::sleep_for(kAwaitPeriod);
  }
}

void StepLedger::settle() {
  const std::uint32_t completed = read(words_->completed);
  while (!open_.empty() && has_reached(completed, open_.front().number)) {
    open_.pop_front();
    comm_.watchdog().progress();
  }
}

void StepLedger::watch() {
  std::unique_ptr<Watchdog::Wait> wait;
  std::unique_ptr<Watchdog::Wait> exposed;
  std::uint32_t waited_for = 0;
  std::unique_lock lock(mutex_);
  while (!stop_) {
    settle();
    const bool waiting = !open_.empty() && has_reached(read(words_->waiting), open_.front().number);
    if (wait && (!waiting || waited_for != open_.front().number)) { wait.reset(); }
    if (waiting && !wait) {
      const Open& front = open_.front();
      waited_for = front.number;
      wait = std::make_unique<Watchdog::Wait>(comm_.waiting(operation_, front.peer, front.bytes, front.step));
    }
    if (open_.empty()) {
      exposed.reset();
      changed_.wait(lock);
      continue;
    }
    if (!exposed) { exposed = std::make_unique<Watchdog::Wait>(comm_.watchdog().exposed()); }
    if (check_ && !failure_) {
      try {
        check_();
      } catch (const std::exception& error) {
        // The host may stand in a launch that never returns, so nobody else can speak.
        if (comm_.size() > 1) { comm_.abort(comm_.watchdog().describe() + error.what()); }
        failure_ = std::current_exception();
      }
    }
    changed_.wait_for(lock, kWatchPeriod);
  }
}

}  // namespace annulus
