// SPDX-License-Identifier: Apache-2.0
// Element types in device code, and the few device operations that several kernels share.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace annulus::kernels::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;

/// 2^x by the special function unit; relative error 2^-22, subnormals flushed to zero, 2^-inf = 0, 2^0 = 1.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// exp(x) for x <= 0.
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * kLog2E); }

template <class Element>
__device__ __forceinline__ Element to_element(float value);
template <>
__device__ __forceinline__ float to_element<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half to_element<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 to_element<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

/// Four neighbours as one word of memory; `to` only says the element.
__device__ __forceinline__ float4 word_of(const float* /*to*/, float4 value) { return value; }
__device__ __forceinline__ uint2 word_of(const __half* /*to*/, float4 value) {
  const __half2 low = __floats2half2_rn(value.x, value.y);
  const __half2 high = __floats2half2_rn(value.z, value.w);
  return make_uint2(*reinterpret_cast<const unsigned*>(&low), *reinterpret_cast<const unsigned*>(&high));
}
__device__ __forceinline__ uint2 word_of(const __nv_bfloat16* /*to*/, float4 value) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(value.x, value.y);
  const __nv_bfloat162 high = __floats2bfloat162_rn(value.z, value.w);
  return make_uint2(*reinterpret_cast<const unsigned*>(&low), *reinterpret_cast<const unsigned*>(&high));
}

/// Stores four neighbours; `to` aligned to 4 elements.
template <class Element>
__device__ __forceinline__ void store4(Element* to, float4 value) {
  const auto word = word_of(to, value);
  *reinterpret_cast<std::remove_const_t<decltype(word)>*>(to) = word;
}
/// As store4, for what is not read again soon.
template <class Element>
__device__ __forceinline__ void store4_streaming(Element* to, float4 value) {
  const auto word = word_of(to, value);
  __stcs(reinterpret_cast<std::remove_const_t<decltype(word)>*>(to), word);
}

/// Calls `body` with a device element of `dtype` as a tag.
template <class Body>
void with_device_element(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::fp16:
      return body(__half{});
    case DType::bf16:
      return body(__nv_bfloat16{});
    case DType::fp32:
      break;
  }
  body(float{});
}

}  // namespace annulus::kernels::cuda
