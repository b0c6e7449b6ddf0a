// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_handles.hpp"

#include <cuda_runtime_api.h>

namespace annulus {

/// A moment of a stream: an event to wait for, and the time at which a clock saw it.
class CudaMoment {
 public:
  /// Reached with the stream's work before it; without timing.
  cudaEvent_t passed() const { return passed_.get(); }
  /// Milliseconds from `earlier` to this one. Blocks until the clocks have read both, which takes microseconds once both are reached.
  double ms_since(const CudaMoment& earlier) const {
    ANNULUS_CUDA(cudaEventSynchronize(earlier.read_.get()));
    ANNULUS_CUDA(cudaEventSynchronize(read_.get()));
    float ms = 0.0F;
    ANNULUS_CUDA(cudaEventElapsedTime(&ms, earlier.read_.get(), read_.get()));
    return static_cast<double>(ms);
  }

 private:
  friend class CudaClock;

  CudaEvent passed_{cudaEventDisableTiming};
  CudaEvent read_;
};

/// Reads the time at which one stream comes to its moments, and costs it nothing: between two kernels an event with timing takes 3 us of
/// the stream, a word written to host memory as much, an event without timing none (measured on an H200). So the stream records the latter,
/// and a stream of the clock's own does the rest behind it. All moments of a clock are of one stream: those of a stream that waits would
/// keep the others'. Clocks of two streams agree to some microseconds, and to tens of them where processes take turns on a GPU.
class CudaClock {
 public:
  void read(CudaMoment& moment, cudaStream_t stream) {
    ANNULUS_CUDA(cudaEventRecord(moment.passed_.get(), stream));
    ANNULUS_CUDA(cudaStreamWaitEvent(stream_.get(), moment.passed_.get(), cudaEventWaitDefault));
    ANNULUS_CUDA(cudaEventRecord(moment.read_.get(), stream_.get()));
  }
  /// What is enqueued on the result runs once `stream` has done what it holds now.
  cudaStream_t behind(cudaStream_t stream) {
    ANNULUS_CUDA(cudaEventRecord(present_.get(), stream));
    ANNULUS_CUDA(cudaStreamWaitEvent(stream_.get(), present_.get(), cudaEventWaitDefault));
    return stream_.get();
  }

 private:
  CudaStream stream_{StreamPriority::high};
  CudaEvent present_{cudaEventDisableTiming};
};

}  // namespace annulus
