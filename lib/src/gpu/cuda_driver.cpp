// SPDX-License-Identifier: Apache-2.0
#include "gpu/cuda_driver.hpp"

#include <annulus/core/error.hpp>

namespace annulus {

namespace {

/// The driver's function of the interface that `version` (as CUDART_VERSION) introduced.
template <class Function>
void look_up(const char* name, [[maybe_unused]] unsigned int version, Function& function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &address, version, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess || address == nullptr) {
    static_cast<void>(cudaGetLastError());
    throw RuntimeFailure(
        fmt::format("the CUDA driver has no {}: {}", name, status == cudaSuccess ? "too old" : cudaGetErrorString(status)));
  }
  function = reinterpret_cast<Function>(address);
}

CUdeviceptr address_of(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

const CudaDriver& CudaDriver::get() {
  static const CudaDriver driver;
  return driver;
}

CudaDriver::CudaDriver() {
  look_up("cuGetErrorString", 6000, error_string_);
  look_up("cuMemGetAddressRange", 3020, address_range_);
  look_up("cuStreamWriteValue32", 11070, write_value_);
  look_up("cuStreamWaitValue32", 11070, wait_value_);
}

void CudaDriver::write_word(cudaStream_t stream, std::uint32_t* word, std::uint32_t value) const {
  check(write_value_(stream, address_of(word), value, CU_STREAM_WRITE_VALUE_DEFAULT), "cuStreamWriteValue32");
}

void CudaDriver::wait_for_word(cudaStream_t stream, const std::uint32_t* word, std::uint32_t value) const {
  check(wait_value_(stream, address_of(word), value, CU_STREAM_WAIT_VALUE_GEQ), "cuStreamWaitValue32");
}

CudaDriver::Range CudaDriver::allocation_of(const void* address) const {
  CUdeviceptr base = 0;
  std::size_t bytes = 0;
  check(address_range_(&base, &bytes, address_of(address)), "cuMemGetAddressRange");
  return {reinterpret_cast<std::byte*>(base), checked_narrow<std::int64_t>(bytes)};
}

void CudaDriver::check(CUresult result, const char* call, std::source_location where) const {
  if (result == CUDA_SUCCESS) { return; }
  const char* text = nullptr;
  if (error_string_(result, &text) != CUDA_SUCCESS || text == nullptr) { text = "unknown error"; }
  throw RuntimeFailure(fmt::format("{} failed at {}:{}: {}", call, where.file_name(), where.line(), text));
}

}  // namespace annulus
