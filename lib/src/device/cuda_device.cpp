// SPDX-License-Identifier: Apache-2.0
#include <annulus/device/cuda_device.hpp>

#include <annulus/core/error.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/kernels/cuda.hpp>

#include "cuda_access.hpp"
#include "gpu/cuda_clock.hpp"
#include "gpu/cuda_handles.hpp"
#include "gpu/profiler_range.hpp"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace annulus {
namespace {

/// For destructors and noexcept functions: says once what failed, and goes on.
void log_failure(cudaError_t status, const char* call) noexcept {
  static_cast<void>(cudaGetLastError());
  // The process is ending and the runtime is gone already.
  if (status == cudaSuccess || status == cudaErrorCudartUnloading) { return; }
  try {
    spdlog::error("{} failed: {}", call, cudaGetErrorString(status));
  } catch (...) {  // nobody is left to tell
  }
}

/// Moments are made once and handed out again.
class MomentPool {
 public:
  MomentPool() = default;
  CudaMoment take() {
    if (free_.empty()) { return {}; }
    CudaMoment moment = std::move(free_.back());
    free_.pop_back();
    return moment;
  }
  void give_back(CudaMoment moment) noexcept {
    try {
      free_.push_back(std::move(moment));
    } catch (...) {  // then it is destroyed instead
    }
  }

 private:
  std::vector<CudaMoment> free_;
};

/// A moment of a queue, returned to its pool in the end.
class RecordedEvent final : public Event {
 public:
  RecordedEvent(std::shared_ptr<MomentPool> pool, CudaClock& clock, cudaStream_t stream) : pool_(std::move(pool)), moment_(pool_->take()) {
    clock.read(moment_, stream);
  }
  RecordedEvent(const RecordedEvent&) = delete;
  RecordedEvent& operator=(const RecordedEvent&) = delete;
  ~RecordedEvent() override { pool_->give_back(std::move(moment_)); }

  bool reached() override { return is_reached(get()); }
  void synchronize() override { ANNULUS_CUDA(cudaEventSynchronize(get())); }
  double ms_since(const Event& earlier) const override { return moment_.ms_since(dynamic_cast<const RecordedEvent&>(earlier).moment_); }
  cudaEvent_t get() const { return moment_.passed(); }

 private:
  std::shared_ptr<MomentPool> pool_;
  CudaMoment moment_;
};

/// The streams of all queues, and the one on which the pool gives and takes memory. They wait for each other where memory changes hands.
class StreamSet {
 public:
  cudaStream_t memory() const { return memory_.get(); }

  void add(cudaStream_t stream) {
    streams_.push_back(stream);
    follow(stream, memory_.get());
  }
  /// The memory stream outlives the work that is left on `stream`.
  void remove(cudaStream_t stream) {
    follow(memory_.get(), stream);
    std::erase(streams_, stream);
  }
  /// All queues wait for what the memory stream has done.
  void publish_allocation() {
    ANNULUS_CUDA(cudaEventRecord(event_.get(), memory_.get()));
    for (cudaStream_t stream : streams_) { ANNULUS_CUDA(cudaStreamWaitEvent(stream, event_.get(), 0)); }
  }
  /// The memory stream waits for the present end of every queue.
  void collect_uses() {
    for (cudaStream_t stream : streams_) { follow(memory_.get(), stream); }
  }

 private:
  void follow(cudaStream_t follower, cudaStream_t leader) {
    ANNULUS_CUDA(cudaEventRecord(event_.get(), leader));
    ANNULUS_CUDA(cudaStreamWaitEvent(follower, event_.get(), 0));
  }

  CudaStream memory_;
  CudaEvent event_{cudaEventDisableTiming};
  std::vector<cudaStream_t> streams_;
};

class CudaQueue final : public Queue {
 public:
  explicit CudaQueue(std::shared_ptr<StreamSet> streams) : streams_(std::move(streams)) { streams_->add(stream_.get()); }
  CudaQueue(const CudaQueue&) = delete;
  CudaQueue& operator=(const CudaQueue&) = delete;
  ~CudaQueue() override {
    if (unwinding()) { return; }
    try {
      streams_->remove(stream_.get());
    } catch (const Error& error) { spdlog::error("{}", error.what()); }
  }
  void synchronize() override { ANNULUS_CUDA(cudaStreamSynchronize(stream_.get())); }
  cudaStream_t get() const { return stream_.get(); }
  CudaClock& clock() { return clock_; }

 private:
  std::shared_ptr<StreamSet> streams_;
  CudaStream stream_;
  CudaClock clock_;
};

CudaQueue& cuda_queue(Queue& queue) {
  auto* const cuda = dynamic_cast<CudaQueue*>(&queue);
  ANNULUS_ASSERT(cuda != nullptr, "a queue of another device");
  return *cuda;
}

/// A pool that keeps what is freed, so that a loop allocates from the driver once.
class MemoryPool {
 public:
  explicit MemoryPool(int device) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    ANNULUS_CUDA(cudaMemPoolCreate(&pool_, &properties));
    std::uint64_t threshold = std::numeric_limits<std::uint64_t>::max();
    const cudaError_t status = cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &threshold);
    if (status != cudaSuccess) {
      static_cast<void>(cudaMemPoolDestroy(pool_));
      check_cuda(status, "cudaMemPoolSetAttribute");
    }
  }
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;
  ~MemoryPool() {
    const cudaError_t status = cudaMemPoolDestroy(pool_);
    if (status != cudaSuccess) { log_failure(status, "cudaMemPoolDestroy"); }
  }
  cudaMemPool_t get() const { return pool_; }

 private:
  cudaMemPool_t pool_ = nullptr;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const DeviceOptions& options) : options_(options), number_(options.number) {
    const int gpus = require_gpus();
    ANNULUS_EXPECTS(number_ >= 0 && number_ < gpus, "backend cuda: there is no device {}; this process sees {} GPU{}", number_, gpus,
                    gpus == 1 ? ", number 0" : fmt::format("s, 0 to {}", gpus - 1));
    // For good: transports and other users of this thread go by the current device. The guards below serve other threads.
    ANNULUS_CUDA(cudaSetDevice(number_));
    info_ = visible_gpus().at(static_cast<std::size_t>(number_));
    ANNULUS_EXPECTS(kernels::cuda::built_for_current_device(),
                    "backend cuda: {} has compute capability {}.{}, for which this binary holds no machine code (see `annulus info`)",
                    info_.name, info_.compute_major, info_.compute_minor);
    pool_ = std::make_unique<MemoryPool>(number_);
    streams_ = std::make_shared<StreamSet>();
    moments_ = std::make_shared<MomentPool>();
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;
  ~CudaDevice() override {
    if (unwinding()) { return; }
    require_nothing_held(memory_.in_use);
    const cudaError_t entered = cudaSetDevice(number_);
    if (entered != cudaSuccess) { log_failure(entered, "cudaSetDevice"); }
    const cudaError_t status = cudaStreamSynchronize(streams_->memory());
    if (status != cudaSuccess) { log_failure(status, "cudaStreamSynchronize"); }
  }

  BackendKind kind() const override { return BackendKind::cuda; }
  int number() const { return number_; }
  std::string describe() const override {
    return fmt::format("cuda: {} (device {}, {}, compute capability {}.{})", info_.name, number_, info_.uuid, info_.compute_major,
                       info_.compute_minor);
  }
  bool host_memory() const override { return false; }

  std::unique_ptr<Queue> make_queue() override {
    const DeviceGuard guard(number_);
    return std::make_unique<CudaQueue>(streams_);
  }

  Buffer allocate(std::int64_t bytes, MemoryUse use) override {
    ANNULUS_ASSERT(bytes >= 0, "allocation of {} bytes", bytes);
    if (bytes == 0) { return {}; }
    const DeviceGuard guard(number_);
    void* data = nullptr;
    const std::uint64_t reserved = reserved_bytes();
    cudaError_t status = try_allocate(&data, bytes, use);
    if (status == cudaErrorMemoryAllocation) {
      // What the pool keeps may be what is missing.
      static_cast<void>(cudaGetLastError());
      ANNULUS_CUDA(cudaStreamSynchronize(streams_->memory()));
      ANNULUS_CUDA(cudaMemPoolTrimTo(pool_->get(), 0));
      status = try_allocate(&data, bytes, use);
    }
    // More than the device has may also come back as an invalid value.
    if (status == cudaErrorMemoryAllocation || (status != cudaSuccess && bytes > info_.total_bytes)) { refuse(bytes); }
    check_cuda(status, from_driver(use) ? "cudaMalloc" : "cudaMallocFromPoolAsync");
    if (!from_driver(use)) { streams_->publish_allocation(); }
    if (from_driver(use)) { driver_bytes_ += bytes; }
    ++(from_driver(use) || reserved_bytes() > reserved ? memory_.taken : memory_.reused);
    memory_.in_use += bytes;
    memory_.high_water = std::max(memory_.high_water, memory_.in_use);
    return Buffer(this, static_cast<std::byte*>(data), bytes, use);
  }

  void deallocate(std::byte* data, std::int64_t bytes, MemoryUse use) noexcept override {
    // Freeing waits for the device, or stands behind what its streams have been given, and that may wait for a peer that is gone.
    if (data == nullptr || unwinding()) { return; }
    memory_.in_use -= bytes;
    if (from_driver(use)) { driver_bytes_ -= bytes; }
    try {
      const DeviceGuard guard(number_);
      if (from_driver(use)) {
        // Waits for all work of the device, and so for the queues.
        ANNULUS_CUDA(cudaFree(data));
      } else {
        streams_->collect_uses();
        ANNULUS_CUDA(cudaFreeAsync(data, streams_->memory()));
      }
    } catch (const std::exception& error) {
      try {
        spdlog::error("freeing {} bytes of GPU memory: {}", bytes, error.what());
      } catch (...) {  // nobody is left to tell
      }
    }
  }

  MemoryReport memory() const override {
    const DeviceGuard guard(number_);
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    ANNULUS_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
    MemoryReport report = memory_;
    report.device_own = checked_narrow<std::int64_t>(reserved_bytes()) + driver_bytes_;
    report.device_others = checked_narrow<std::int64_t>(total_bytes - free_bytes) - report.device_own;
    return report;
  }
  std::int64_t available_bytes() const override {
    const DeviceGuard guard(number_);
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    std::uint64_t used = 0;
    ANNULUS_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
    ANNULUS_CUDA(cudaMemPoolGetAttribute(pool_->get(), cudaMemPoolAttrUsedMemCurrent, &used));
    const std::int64_t available = checked_narrow<std::int64_t>(free_bytes) + checked_narrow<std::int64_t>(reserved_bytes() - used);
    return std::max<std::int64_t>(0, available - std::min(kMostLibraryBytes, info_.total_bytes / 50));
  }
  void reset_high_water() override { memory_.high_water = memory_.in_use; }

  void upload(Queue& queue, void* dst, const void* host, std::int64_t bytes) override {
    copy_bytes(queue, dst, host, bytes, cudaMemcpyHostToDevice);
  }
  void download(Queue& queue, void* host, const void* src, std::int64_t bytes) override {
    copy_bytes(queue, host, src, bytes, cudaMemcpyDeviceToHost);
  }
  void copy(Queue& queue, void* dst, const void* src, std::int64_t bytes) override {
    copy_bytes(queue, dst, src, bytes, cudaMemcpyDeviceToDevice);
  }

  void pack(Queue& queue, std::span<const kernels::PackTask> tasks) override {
    const ProfilerRange range("pack");
    const DeviceGuard guard(number_);
    translated([&] { kernels::cuda::pack(tasks, stream_of(queue)); });
  }
  std::unique_ptr<Event> record(Queue& queue) override {
    const DeviceGuard guard(number_);
    CudaQueue& cuda = cuda_queue(queue);
    return std::make_unique<RecordedEvent>(moments_, cuda.clock(), cuda.get());
  }
  void wait(Queue& queue, const Event& event) override {
    const DeviceGuard guard(number_);
    ANNULUS_CUDA(cudaStreamWaitEvent(stream_of(queue), dynamic_cast<const RecordedEvent&>(event).get(), 0));
  }

 private:
  /// The driver's and the libraries' own: code loaded on first use, cuBLAS handles, graphs.
  static constexpr std::int64_t kMostLibraryBytes = std::int64_t{1} << 30;

  /// By the pool, in use or kept.
  std::uint64_t reserved_bytes() const {
    std::uint64_t reserved = 0;
    ANNULUS_CUDA(cudaMemPoolGetAttribute(pool_->get(), cudaMemPoolAttrReservedMemCurrent, &reserved));
    return reserved;
  }

  bool from_driver(MemoryUse use) const { return use == MemoryUse::slot || options_.memory_pool == MemoryPooling::off; }

  cudaError_t try_allocate(void** data, std::int64_t bytes, MemoryUse use) {
    const auto size = static_cast<std::size_t>(bytes);
    if (from_driver(use)) { return cudaMalloc(data, size); }
    return cudaMallocFromPoolAsync(data, size, pool_->get(), streams_->memory());
  }

  [[noreturn]] void refuse(std::int64_t bytes) const {
    static_cast<void>(cudaGetLastError());
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    ANNULUS_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
    throw RuntimeFailure(
        fmt::format("backend cuda: cannot allocate {} bytes on {} (device {}): {} of {} bytes are free, this backend holds {}", bytes,
                    info_.name, number_, free_bytes, total_bytes, memory_.in_use));
  }

  void copy_bytes(Queue& queue, void* dst, const void* src, std::int64_t bytes, cudaMemcpyKind direction) {
    if (bytes == 0) { return; }
    const DeviceGuard guard(number_);
    ANNULUS_CUDA(cudaMemcpyAsync(dst, src, checked_narrow<std::size_t>(bytes), direction, stream_of(queue)));
  }

  DeviceOptions options_;
  int number_ = 0;
  GpuInfo info_;
  MemoryReport memory_;            ///< without what only the device knows
  std::int64_t driver_bytes_ = 0;  ///< in use and not from the pool
  std::unique_ptr<MemoryPool> pool_;
  std::shared_ptr<StreamSet> streams_;
  std::shared_ptr<MomentPool> moments_;
};

}  // namespace

int device_of(const Device& device) {
  const auto* const cuda = dynamic_cast<const CudaDevice*>(&device);
  ANNULUS_EXPECTS(cuda != nullptr, "this works on memory of backend cuda, found {}", to_string(device.kind()));
  return cuda->number();
}

cudaStream_t stream_of(Queue& queue) { return cuda_queue(queue).get(); }

std::unique_ptr<Device> make_cuda_device(const DeviceOptions& options) { return std::make_unique<CudaDevice>(options); }

}  // namespace annulus
