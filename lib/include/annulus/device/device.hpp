// SPDX-License-Identifier: Apache-2.0
// The seam to the hardware: memory, queues, events and copies, no mathematics. Every operation is enqueued on a queue and may still be in
// flight at return; operations of one queue run in order. Memory handed to an operation stays in use until the queue has passed it. On
// the host all is done at once.
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/kernels/tasks.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

namespace annulus {

class Device;

/// What a piece of memory is for; high-water marks are kept for the sum.
enum class MemoryUse {
  tensor,  ///< Q, K, V, O, LSE, partials: from the pool
  slot,    ///< memory that peers or transports touch: allocated once per plan, never from a pool
};

/// Owns memory of one device, which must outlive it: a device that ends before its memory ends the process. Move-only; moved-from is empty.
/// Frees on destruction, which on CUDA is ordered after the queues' work.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device* owner, std::byte* data, std::int64_t bytes, MemoryUse use) : owner_(owner), data_(data), bytes_(bytes), use_(use) {}
  Buffer(Buffer&& other) noexcept
      : owner_(std::exchange(other.owner_, nullptr)),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        use_(other.use_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      reset();
      owner_ = std::exchange(other.owner_, nullptr);
      data_ = std::exchange(other.data_, nullptr);
      bytes_ = std::exchange(other.bytes_, 0);
      use_ = other.use_;
    }
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { reset(); }

  std::byte* get() const { return data_; }
  std::int64_t bytes() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }
  void reset() noexcept;

 private:
  Device* owner_ = nullptr;
  std::byte* data_ = nullptr;
  std::int64_t bytes_ = 0;
  MemoryUse use_ = MemoryUse::tensor;
};

/// A lane of ordered work (a CUDA stream; nothing on a CPU).
class Queue {
 public:
  virtual ~Queue() = default;
  /// Returns when all work enqueued so far is done.
  /// @throws RuntimeFailure if any of it failed
  virtual void synchronize() = 0;
};

/// A moment in a queue.
class Event {
 public:
  virtual ~Event() = default;
  /// Whether the queue has reached it. Never blocks.
  virtual bool reached() = 0;
  /// Blocks until the queue has reached it.
  virtual void synchronize() = 0;
  /// Milliseconds from `earlier` (an event of the same device) to this one; both must have been reached.
  virtual double ms_since(const Event& earlier) const = 0;
};

/// Bytes a device holds or held.
struct MemoryReport {
  std::int64_t in_use = 0;
  std::int64_t high_water = 0;     ///< largest in_use since the last reset_high_water()
  std::int64_t reused = 0;         ///< allocations for which a pool had kept memory
  std::int64_t taken = 0;          ///< those for which memory was taken from the system
  std::int64_t device_own = 0;     ///< taken from the device for all this, with what a pool keeps; 0 where there is no device
  std::int64_t device_others = 0;  ///< taken from the device by contexts, libraries and other processes
};

/// The host's memory or a GPU's, and the work on it.
class Device {
 public:
  virtual ~Device() = default;
  virtual BackendKind kind() const = 0;
  /// What it is, in a few words.
  virtual std::string describe() const = 0;
  /// Whether the memory can be read and written by the host directly.
  virtual bool host_memory() const { return true; }

  virtual std::unique_ptr<Queue> make_queue() = 0;
  /// @throws RuntimeFailure with the numbers if there is not enough memory
  virtual Buffer allocate(std::int64_t bytes, MemoryUse use) = 0;
  virtual void deallocate(std::byte* data, std::int64_t bytes, MemoryUse use) noexcept = 0;
  virtual MemoryReport memory() const = 0;
  /// Bytes that could still be allocated now, as far as the system says, less what libraries will take of them.
  virtual std::int64_t available_bytes() const = 0;
  virtual void reset_high_water() = 0;

  /// Host to device memory and back. The host range must stay until the queue has passed.
  virtual void upload(Queue& queue, void* dst, const void* host, std::int64_t bytes) = 0;
  virtual void download(Queue& queue, void* host, const void* src, std::int64_t bytes) = 0;
  virtual void copy(Queue& queue, void* dst, const void* src, std::int64_t bytes) = 0;
  /// Copies rows together as PackTask says, for all tasks, in no order: no task's dst may alias the src or dst of another.
  virtual void pack(Queue& queue, std::span<const kernels::PackTask> tasks) = 0;

  /// Marks the queue's present end. Work enqueued later is not covered.
  virtual std::unique_ptr<Event> record(Queue& queue) = 0;
  /// Work enqueued on `queue` from now on starts only once `event` is reached.
  virtual void wait(Queue& queue, const Event& event) = 0;

 protected:
  /// For destructors: ends the process if buffers still hold memory, as each would be freed by what is no more. Not while unwinding, when
  /// memory may be left behind.
  static void require_nothing_held(std::int64_t bytes) noexcept;
};

/// Settings a device is made from.
struct DeviceOptions {
  BackendKind kind = BackendKind::cpu;
  int threads = 1;                                ///< of the host: those that copy rows together
  int number = 0;                                 ///< of a GPU
  MemoryPooling memory_pool = MemoryPooling::on;  ///< of a GPU
};

/// @throws NotCompiled if this binary lacks it, with what it has
std::unique_ptr<Device> make_device(const DeviceOptions& options);

}  // namespace annulus
