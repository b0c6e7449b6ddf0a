// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/cublas.hpp>

#include "check.hpp"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>

namespace annulus::kernels::cuda {
namespace {

constexpr int kRows = 8192;
constexpr int kInner = 4096;
constexpr int kThreads = 256;

__device__ float convert_to(float value, float /*of*/) { return value; }
__device__ __half convert_to(float value, __half /*of*/) { return __float2half_rn(value); }
__device__ __nv_bfloat16 convert_to(float value, __nv_bfloat16 /*of*/) { return __float2bfloat16_rn(value); }

/// Numbers spread like a normal distribution: the power that a product draws, and with it its rate, depends on its operands' bits.
template <class Element>
__global__ void __launch_bounds__(kThreads) fill_random(Element* data, unsigned count, unsigned seed) {
  for (unsigned i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    unsigned bits = (i + seed) * 2654435761U;
    float sum = -2.0F;
    for (int part = 0; part < 4; ++part) {  // a sum of four uniform numbers
      bits ^= bits >> 16U, bits *= 2246822519U, bits ^= bits >> 13U, bits *= 3266489917U;
      sum += static_cast<float>(bits >> 8U) * 0x1p-24F;
    }
    data[i] = convert_to(1.732F * sum, Element{});
  }
}

struct FreeDeviceMemory {
  void operator()(void* data) const { static_cast<void>(cudaFree(data)); }
};
using DeviceMemory = std::unique_ptr<void, FreeDeviceMemory>;

/// Null if there is none left.
DeviceMemory device_memory(std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  ANNULUS_KERNELS_CHECK(status);
  return DeviceMemory(data);
}

struct Handles {
  Handles() {
    ANNULUS_KERNELS_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (cudaEvent_t& event : events) { ANNULUS_KERNELS_CHECK(cudaEventCreate(&event)); }
    ANNULUS_KERNELS_CHECK(cublasCreate(&cublas));
    ANNULUS_KERNELS_CHECK(cublasSetStream(cublas, stream));
  }
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles() {
    if (cublas != nullptr) { static_cast<void>(cublasDestroy(cublas)); }
    for (cudaEvent_t event : events) { static_cast<void>(cudaEventDestroy(event)); }
    static_cast<void>(cudaStreamDestroy(stream));
  }

  static constexpr std::size_t kTimed = 16;
  cudaStream_t stream = nullptr;
  std::array<cudaEvent_t, kTimed + 1> events{};
  cublasHandle_t cublas = nullptr;
};

template <class Element>
double rate_of(cudaDataType_t type) {
  constexpr unsigned kOperand = unsigned{kRows} * kInner;
  const DeviceMemory a = device_memory(kOperand * sizeof(Element));
  const DeviceMemory b = device_memory(kOperand * sizeof(Element));
  const DeviceMemory c = device_memory(std::size_t{kRows} * kRows * sizeof(Element));
  if (!a || !b || !c) { return 0.0; }
  Handles handles;
  for (void* operand : {a.get(), b.get()}) {
    fill_random<<<1024, kThreads, 0, handles.stream>>>(static_cast<Element*>(operand), kOperand, operand == a.get() ? 1U : 7777U);
    check_launch("fill_random");
  }
  const float one = 1.0F;
  const float zero = 0.0F;
  const auto multiply = [&] {
    ANNULUS_KERNELS_CHECK(cublasGemmEx(handles.cublas, CUBLAS_OP_T, CUBLAS_OP_N, kRows, kRows, kInner, &one, a.get(), type, kInner, b.get(),
                                       type, kInner, &zero, c.get(), type, kRows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  };
  for (int i = 0; i < 4; ++i) { multiply(); }
  ANNULUS_KERNELS_CHECK(cudaEventRecord(handles.events[0], handles.stream));
  for (std::size_t i = 1; i <= Handles::kTimed; ++i) {
    multiply();
    ANNULUS_KERNELS_CHECK(cudaEventRecord(handles.events[i], handles.stream));
  }
  ANNULUS_KERNELS_CHECK(cudaStreamSynchronize(handles.stream));
  std::array<float, Handles::kTimed> times{};
  for (std::size_t i = 0; i < times.size(); ++i) {
    ANNULUS_KERNELS_CHECK(cudaEventElapsedTime(&times[i], handles.events[i], handles.events[i + 1]));
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return 2.0 * kRows * kRows * kInner / (static_cast<double>(times[times.size() / 2]) * 1e-3);
}

}  // namespace

double product_rate(DType dtype) {
  switch (dtype) {
    case DType::fp16:
      return rate_of<__half>(CUDA_R_16F);
    case DType::bf16:
      return rate_of<__nv_bfloat16>(CUDA_R_16BF);
    case DType::fp32:
      break;
  }
  return rate_of<float>(CUDA_R_32F);
}

}  // namespace annulus::kernels::cuda
