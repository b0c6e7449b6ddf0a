// SPDX-License-Identifier: Apache-2.0
#include "host_device.hpp"

#include <annulus/core/error.hpp>
#include <annulus/kernels/cpu.hpp>
#include <annulus/kernels/reference.hpp>

#include "host_memory.hpp"

#include <chrono>
#include <cstdlib>
#include <cstring>

namespace annulus {
namespace {

constexpr std::int64_t kCacheLine = 64;
constexpr std::int64_t kHugePage = std::int64_t{2} << 20;

/// All work is done when its call returns, so there is nothing to wait for.
class HostQueue final : public Queue {
 public:
  void synchronize() override {}
};

class HostEvent final : public Event {
 public:
  bool reached() override { return true; }
  void synchronize() override {}
  double ms_since(const Event& earlier) const override {
    const auto* event = dynamic_cast<const HostEvent*>(&earlier);
    ANNULUS_EXPECTS(event != nullptr, "ms_since needs an event of the same device");
    return std::chrono::duration<double, std::milli>(when_ - event->when_).count();
  }

 private:
  std::chrono::steady_clock::time_point when_ = std::chrono::steady_clock::now();
};

void copy_bytes(void* dst, const void* src, std::int64_t bytes) {
  ANNULUS_EXPECTS(bytes >= 0, "cannot copy {} bytes", bytes);
  if (bytes > 0) { std::memcpy(dst, src, static_cast<std::size_t>(bytes)); }
}

void check(const kernels::PackTask& task) {
  ANNULUS_EXPECTS(task.batch >= 1 && task.rows >= 1 && task.heads >= 1 && task.head_dim >= 1 && task.element_size >= 1,
                  "pack: extents must be at least 1, found batch {} rows {} heads {} head_dim {} element_size {}", task.batch, task.rows,
                  task.heads, task.head_dim, task.element_size);
  ANNULUS_EXPECTS(task.src != nullptr && task.dst != nullptr, "pack: null pointer");
}

}  // namespace

HostDevice::HostDevice(BackendKind kind, int threads) : kind_(kind), threads_(threads) {
  ANNULUS_EXPECTS(threads >= 1, "threads must be at least 1, found {}", threads);
}

std::string HostDevice::describe() const { return std::string(to_string(kind_)); }

std::unique_ptr<Queue> HostDevice::make_queue() { return std::make_unique<HostQueue>(); }

Buffer HostDevice::allocate(std::int64_t bytes, MemoryUse use) {
  ANNULUS_EXPECTS(bytes >= 0, "cannot allocate {} bytes", bytes);
  if (bytes == 0) { return {}; }
  const std::int64_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  // An overcommitting system grants more than there is and kills the job later, so large requests are compared with what is left.
  const bool possible = bytes < kHugePage || bytes <= available_host_memory();
  void* data = nullptr;
  if (possible) {
    const std::int64_t padded = (bytes + alignment - 1) / alignment * alignment;
    data = std::aligned_alloc(static_cast<std::size_t>(alignment), static_cast<std::size_t>(padded));
  }
  if (data == nullptr) {
    throw RuntimeFailure(fmt::format("backend {}: cannot allocate {} bytes of host memory: {} are available, this rank holds {}",
                                     to_string(kind_), bytes, available_host_memory(), in_use_.load()));
  }
  ++taken_;
  const std::int64_t now = in_use_.fetch_add(bytes) + bytes;
  std::int64_t high = high_water_.load();
  while (high < now && !high_water_.compare_exchange_weak(high, now)) {}
  return {this, static_cast<std::byte*>(data), bytes, use};
}

void HostDevice::deallocate(std::byte* data, std::int64_t bytes, MemoryUse /*use*/) noexcept {
  if (data == nullptr) { return; }
  std::free(data);
  in_use_.fetch_sub(bytes);
}

MemoryReport HostDevice::memory() const {
  MemoryReport report;
  report.in_use = in_use_.load();
  report.high_water = high_water_.load();
  report.taken = taken_.load();
  return report;
}

std::int64_t HostDevice::available_bytes() const { return available_host_memory(); }

void HostDevice::reset_high_water() { high_water_ = in_use_.load(); }

void HostDevice::upload(Queue& /*queue*/, void* dst, const void* host, std::int64_t bytes) { copy_bytes(dst, host, bytes); }
void HostDevice::download(Queue& /*queue*/, void* host, const void* src, std::int64_t bytes) { copy_bytes(host, src, bytes); }
void HostDevice::copy(Queue& /*queue*/, void* dst, const void* src, std::int64_t bytes) { copy_bytes(dst, src, bytes); }

void HostDevice::pack(Queue& /*queue*/, std::span<const kernels::PackTask> tasks) {
  for (const kernels::PackTask& task : tasks) {
    check(task);
    if (kind_ == BackendKind::reference) {
      kernels::reference::pack(task);
    } else {
      kernels::cpu::pack(task, threads_);
    }
  }
}

std::unique_ptr<Event> HostDevice::record(Queue& /*queue*/) { return std::make_unique<HostEvent>(); }
void HostDevice::wait(Queue& /*queue*/, const Event& /*event*/) {}

}  // namespace annulus
