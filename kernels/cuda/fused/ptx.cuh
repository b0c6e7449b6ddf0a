// SPDX-License-Identifier: Apache-2.0
// The Hopper instructions that the fused kernel is made of, one small function each: barriers in shared memory, the bulk tensor copy
// engine, register reallocation, the two conversions. The matrix instruction has a file of its own, wgmma.cuh.
// Source of the forms: NVIDIA, PTX ISA 8.x, sections mbarrier, cp.async.bulk.tensor, setmaxnreg, ldmatrix.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace annulus::kernels::cuda::fused {

/// An address in the shared memory of this block, as instructions take it.
using SharedAddress = std::uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

/// Lane of this thread in its warp; a value that is not kept from one call to the next.
__device__ __forceinline__ int lane_number() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// --- Barriers in shared memory (8 bytes each). A phase ends when all arrivals and all announced bytes have come. -------------------

__device__ __forceinline__ void barrier_init(SharedAddress barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// Makes initialised barriers visible to the copy engine; a __syncthreads() follows.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives and announces `bytes` that the copy engine will deliver in this phase.
__device__ __forceinline__ void barrier_expect(SharedAddress barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/// Waits until the phase of this parity is over. The loop is inside one asm block: written in C++, it costs the matrix instructions
/// around it their registers (ptxas C7512).
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra.uni done;\n"
      "bra.uni again;\n"
      "done:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void store_zeros(SharedAddress to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}
/// Ordinary writes and reads of shared memory before this come before what the copy engine and the tensor cores do after it.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Copies 16 bytes from global to shared memory in the background.
__device__ __forceinline__ void copy_16_bytes(SharedAddress to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
/// Arrives when the copies of this thread have come.
__device__ __forceinline__ void barrier_arrive_after_copies(SharedAddress barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// --- Bulk tensor copies ------------------------------------------------------------------------------------------------------------

/// Coordinates of a box in a tensor map of this kernel, innermost first; see tensor_maps.hpp.
struct BoxOrigin {
  int column;
  int head;
  int row;
  int residue;
  int batch;
};

__device__ __forceinline__ void copy_box(SharedAddress to, const CUtensorMap* map, SharedAddress barrier, const BoxOrigin& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<std::uint64_t>(map)), "r"(barrier), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.residue), "r"(at.batch)
      : "memory");
}

/// Brings `bytes`, a multiple of 16, to the L2 cache in the background.
__device__ __forceinline__ void prefetch_to_l2(const void* from, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// --- Registers ---------------------------------------------------------------------------------------------------------------------

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
/// Four 8 x 8 matrices of 16-bit elements from shared memory, a row address from each lane.
__device__ __forceinline__ void load_matrices(std::uint32_t* to, SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

/// Four neighbours, or zeros without touching memory. One straight line: a branch here costs the accumulators that take them their
/// registers.
__device__ __forceinline__ void load_or_zero(float& x, float& y, float& z, float& w, const float4* from, bool loads) {
  asm volatile(
      "{\n"
      ".reg .pred loads;\n"
      "setp.ne.b32 loads, %5, 0;\n"
      "mov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\nmov.f32 %2, 0f00000000;\nmov.f32 %3, 0f00000000;\n"
      "@loads ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&f"(x), "=&f"(y), "=&f"(z), "=&f"(w)
      : "l"(from), "r"(loads ? 1 : 0)
      : "memory");
}

/// Stores four neighbours if `stores`; a straight line as well.
__device__ __forceinline__ void store_if(float4* to, float x, float y, float z, float w, bool stores) {
  asm volatile("{\n.reg .pred stores;\nsetp.ne.b32 stores, %5, 0;\n@stores st.global.v4.f32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(to), "f"(x),
               "f"(y), "f"(z), "f"(w), "r"(stores ? 1 : 0)
               : "memory");
}

// --- Conversions -------------------------------------------------------------------------------------------------------------------

/// Two numbers, rounded to nearest even, as one register of an operand; `low` is the first.
template <class Element>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ std::uint32_t pack_pair<__half>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace annulus::kernels::cuda::fused
