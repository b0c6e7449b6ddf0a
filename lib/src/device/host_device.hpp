// SPDX-License-Identifier: Apache-2.0
// Host memory: aligned memory with accounts, queues that run at once, events that are points in time.
#pragma once

#include <annulus/device/device.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace annulus {

/// The device of backends reference and cpu. Every operation is done when it returns.
class HostDevice final : public Device {
 public:
  /// @param threads  of pack()
  HostDevice(BackendKind kind, int threads);
  HostDevice(const HostDevice&) = delete;
  HostDevice& operator=(const HostDevice&) = delete;
  ~HostDevice() override { require_nothing_held(in_use_.load()); }
  BackendKind kind() const override { return kind_; }
  std::string describe() const override;

  std::unique_ptr<Queue> make_queue() override;

  /// 64-byte aligned, from 2 MiB on 2 MiB aligned; contents are undefined and pages untouched.
  Buffer allocate(std::int64_t bytes, MemoryUse use) override;
  void deallocate(std::byte* data, std::int64_t bytes, MemoryUse use) noexcept override;
  MemoryReport memory() const override;
  std::int64_t available_bytes() const override;
  void reset_high_water() override;

  void upload(Queue& queue, void* dst, const void* host, std::int64_t bytes) override;
  void download(Queue& queue, void* host, const void* src, std::int64_t bytes) override;
  void copy(Queue& queue, void* dst, const void* src, std::int64_t bytes) override;
  void pack(Queue& queue, std::span<const kernels::PackTask> tasks) override;

  std::unique_ptr<Event> record(Queue& queue) override;
  void wait(Queue& queue, const Event& event) override;

 private:
  BackendKind kind_;
  int threads_;
  std::atomic<std::int64_t> in_use_ = 0;
  std::atomic<std::int64_t> high_water_ = 0;
  std::atomic<std::int64_t> taken_ = 0;
};

}  // namespace annulus
