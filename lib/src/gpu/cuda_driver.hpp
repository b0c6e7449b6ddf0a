// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace annulus {

/// Functions of the driver that the runtime does not offer. Looked up at run time, never linked, so that the program starts without a
/// driver.
class CudaDriver {
 public:
  /// @throws RuntimeFailure if the driver lacks one of them
  static const CudaDriver& get();

  /// Writes `value` to `word` (device or pinned host memory, of this process or mapped from a peer) once `stream` gets there, after
  /// everything the stream did before.
  void write_word(cudaStream_t stream, std::uint32_t* word, std::uint32_t value) const;
  /// Holds `stream` until `word` has come to `value` or gone past it (cyclically: a counter may wrap).
  void wait_for_word(cudaStream_t stream, const std::uint32_t* word, std::uint32_t value) const;

  struct Range {
    std::byte* base = nullptr;
    std::int64_t bytes = 0;
  };
  /// The allocation that `address` lies in.
  Range allocation_of(const void* address) const;

 private:
  CudaDriver();
  void check(CUresult result, const char* call, std::source_location where = std::source_location::current()) const;

  CUresult(CUDAAPI* write_value_)(CUstream, CUdeviceptr, cuuint32_t, unsigned int) = nullptr;
  CUresult(CUDAAPI* wait_value_)(CUstream, CUdeviceptr, cuuint32_t, unsigned int) = nullptr;
  CUresult(CUDAAPI* address_range_)(CUdeviceptr*, std::size_t*, CUdeviceptr) = nullptr;
  CUresult(CUDAAPI* error_string_)(CUresult, const char**) = nullptr;
};

}  // namespace annulus
