// SPDX-License-Identifier: Apache-2.0
// CUDA handles and status checks for the files of this library that touch a GPU.
#pragma once

#include <annulus/core/error.hpp>

#include <cuda_runtime_api.h>

#include <source_location>
#include <string>
#include <utility>

namespace annulus {

/// Throws RuntimeFailure with call, place and the library's message unless `status` is success; the last-error slot is clear again.
inline void check_cuda(cudaError_t status, const char* call, std::source_location where = std::source_location::current()) {
  if (status == cudaSuccess) { return; }
  static_cast<void>(cudaGetLastError());
  throw RuntimeFailure(fmt::format("{} failed at {}:{}: {}", call, where.file_name(), where.line(), cudaGetErrorString(status)));
}

#define ANNULUS_CUDA(call) ::annulus::check_cuda((call), #call)

/// Whether a query was answered with success; false for "not ready", which CUDA keeps like an error in the slot that the next launch check
/// reads, and which is cleared here.
inline bool is_done(cudaError_t status, const char* query, std::source_location where = std::source_location::current()) {
  if (status == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  check_cuda(status, query, where);
  return true;
}

/// Whether the work before an event is done. Never blocks.
inline bool is_reached(cudaEvent_t event) { return is_done(cudaEventQuery(event), "cudaEventQuery"); }
inline bool is_idle(cudaStream_t stream) { return is_done(cudaStreamQuery(stream), "cudaStreamQuery"); }

/// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    ANNULUS_CUDA(cudaGetDevice(&before_));
    if (before_ != device) { ANNULUS_CUDA(cudaSetDevice(device)); }
    changed_ = before_ != device;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) { static_cast<void>(cudaSetDevice(before_)); }
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// Communication must not queue behind attention.
enum class StreamPriority { normal, high };

/// A stream of the current device that does not synchronise with the default stream.
class CudaStream {
 public:
  explicit CudaStream(StreamPriority priority = StreamPriority::normal) {
    int least = 0;
    int greatest = 0;
    if (priority == StreamPriority::high) { ANNULUS_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest)); }
    ANNULUS_CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
  }
  CudaStream(CudaStream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  CudaStream& operator=(CudaStream&& other) noexcept {
    CudaStream(std::move(other)).swap(*this);
    return *this;
  }
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;
  ~CudaStream() {
    if (stream_ != nullptr) { static_cast<void>(cudaStreamDestroy(stream_)); }
  }
  cudaStream_t get() const { return stream_; }

 private:
  void swap(CudaStream& other) noexcept { std::swap(stream_, other.stream_); }

  cudaStream_t stream_ = nullptr;
};

/// An event of the current device. With timing by default.
class CudaEvent {
 public:
  explicit CudaEvent(unsigned flags = cudaEventDefault) { ANNULUS_CUDA(cudaEventCreateWithFlags(&event_, flags)); }
  CudaEvent(CudaEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  CudaEvent& operator=(CudaEvent&& other) noexcept {
    CudaEvent(std::move(other)).swap(*this);
    return *this;
  }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;
  ~CudaEvent() {
    if (event_ != nullptr) { static_cast<void>(cudaEventDestroy(event_)); }
  }
  cudaEvent_t get() const { return event_; }

 private:
  void swap(CudaEvent& other) noexcept { std::swap(event_, other.event_); }

  cudaEvent_t event_ = nullptr;
};

/// Number of usable GPUs, at least 1.
/// @throws InvalidArgument saying which of driver, driver version or GPU is missing
int require_gpus();

/// The calling thread's device.
int current_device();

/// "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", the same on every process and host.
std::string gpu_uuid(int device);

/// The device of this process with that UUID, or -1 if it sees none.
int device_with_uuid(const std::string& uuid);

}  // namespace annulus
