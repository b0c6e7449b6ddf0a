// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <source_location>
#include <utility>
#include <cuda_runtime.h>
#include <annulus/backend/backend.hpp>
#include <annulus/core/error.hpp>
namespace annulus { enum class StreamPriority { normal, high };
inline void check_cuda(cudaError_t s, const char* call, std::source_location w = std::source_location::current()) {
  if (s == cudaSuccess) { return; }
  static_cast<void>(cudaGetLastError());
  throw RuntimeFailure(fmt::format("{} failed at {}:{}: {}", call, w.file_name(), w.line(), cudaGetErrorString(s)));
}
#define ANNULUS_CUDA(call) ::annulus::check_cuda((call), #call)
class CudaStream {
 public:
  explicit CudaStream(StreamPriority pr) { int lo = 0; int priority = 0; if (pr == StreamPriority::high) { ANNULUS_CUDA(cudaDeviceGetStreamPriorityRange(&lo, &priority)); } ANNULUS_CUDA(cudaStreamCreateWithPriority(&s_, cudaStreamNonBlocking, priority)); }
  CudaStream(CudaStream&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
  ~CudaStream() { if (s_) static_cast<void>(cudaStreamDestroy(s_)); }
  cudaStream_t get() const { return s_; }
 private:
  cudaStream_t s_ = nullptr;
};
class CudaEvent {
 public:
  CudaEvent() { ANNULUS_CUDA(cudaEventCreate(&e_)); }
  CudaEvent(CudaEvent&& o) noexcept : e_(std::exchange(o.e_, nullptr)) {}
  ~CudaEvent() { if (e_) static_cast<void>(cudaEventDestroy(e_)); }
  cudaEvent_t get() const { return e_; }
 private:
  cudaEvent_t e_ = nullptr;
};
cudaStream_t stream_of(Queue& queue);
int current_device();
std::string gpu_uuid(int device);
int device_with_uuid(const std::string& uuid);
}
