// SPDX-License-Identifier: Apache-2.0
// What the backends on host memory share: aligned memory with accounts, queues that run at once, events that are points in time.
#pragma once

#include <annulus/backend/backend.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace annulus {

/// Base of the reference and cpu backends. Every operation is done when it returns.
class HostBackend : public Backend {
 public:
  std::unique_ptr<Queue> make_queue() final;

  /// 64-byte aligned, from 2 MiB on 2 MiB aligned; contents are undefined and pages untouched.
  Buffer allocate(std::int64_t bytes, MemoryUse use) final;
  void deallocate(std::byte* data, std::int64_t bytes, MemoryUse use) noexcept final;
  MemoryReport memory() const final;
  std::int64_t available_bytes() const final;
  void reset_high_water() final;

  void upload(Queue& queue, void* dst, const void* host, std::int64_t bytes) final;
  void download(Queue& queue, void* host, const void* src, std::int64_t bytes) final;
  void copy(Queue& queue, void* dst, const void* src, std::int64_t bytes) final;

  std::unique_ptr<Event> record(Queue& queue) final;
  void wait(Queue& queue, const Event& event) final;

 protected:
  /// Bytes of memory() that the backend took for itself with allocate().
  virtual std::int64_t own_bytes() const { return 0; }

 private:
  std::atomic<std::int64_t> in_use_ = 0;
  std::atomic<std::int64_t> high_water_ = 0;
};

/// @throws InvalidArgument naming the extent or operand that a kernel cannot take
void check_task(const kernels::ZeroKeysTask& task);
void check_task(const kernels::PackTask& task);
void check_task(const kernels::AttendTask& task);
void check_task(const kernels::FinishTask& task);

std::unique_ptr<Backend> make_reference_backend(const BackendOptions& options);

/// @throws RuntimeFailure if this CPU lacks the instructions
std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);

}  // namespace annulus
