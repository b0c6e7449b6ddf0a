// SPDX-License-Identifier: Apache-2.0
// wgmma: D [64, N] fp32 += A [64, 16] x B [16, N] by the four warps of a warpgroup, asynchronously.
//
// Lane l of warp w holds rows 16 w + l / 4 (+ 8) of D: register 4 g + 2 h + e is row + 8 h, column 8 g + 2 (l % 4) + e. Two neighbouring
// column groups of D, rounded and packed pairwise, are an A operand of the next product, with no exchange between lanes.
// Source: NVIDIA, PTX ISA 8.x, wgmma.mma_async (register fragments, matrix descriptor).
#pragma once

#include "ptx.cuh"

namespace annulus::kernels::cuda::fused {

/// Before the first product that reads registers which other instructions have written.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Closes the group of products issued since the last call.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// The compiler moves no read or write of these registers over this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) { asm volatile("" : "+f"(registers[i])::"memory"); }
}

/// Where a matrix operand lies in shared memory: rows of `Swizzle` bytes, 8-row groups `stride_bytes` apart; for an operand read across its
/// rows (V), column panels `leading_bytes` apart.
enum class Swizzle : std::uint32_t { bytes128 = 1, bytes64 = 2, bytes32 = 3 };
struct MatrixDescriptor {
  std::uint32_t low;
  std::uint32_t high;
  __device__ __forceinline__ MatrixDescriptor(SharedAddress begin, std::uint32_t leading_bytes, std::uint32_t stride_bytes, Swizzle swizzle)
      : low((begin & 0x3FFFFU) >> 4U | leading_bytes >> 4U << 16U), high(stride_bytes >> 4U | static_cast<std::uint32_t>(swizzle) << 30U) {}
  /// The operand `bytes` further on. Shared memory ends below 2^18, so the sum stays in its field.
  __device__ __forceinline__ std::uint64_t at(int bytes) const {
    return static_cast<std::uint64_t>(high) << 32U | (low + static_cast<std::uint32_t>(bytes >> 4));
  }
};

/// The products of one width N:
///   shared_a       A and B from shared memory, both with k along their rows (scores = Q K^T); keep = 0 starts from zero
///   register_a     the same with A in registers
///   register_a_by  A in registers, B across its rows (O += P V, V as it lies in memory)
template <class Element, int N>
struct Product;

// Operand lists, %0 .. of the accumulators and their constraints, in groups of eight.
#define ANNULUS_D8(n0, n1, n2, n3, n4, n5, n6, n7) "%" #n0 ",%" #n1 ",%" #n2 ",%" #n3 ",%" #n4 ",%" #n5 ",%" #n6 ",%" #n7
#define ANNULUS_LIST_8 ANNULUS_D8(0, 1, 2, 3, 4, 5, 6, 7)
#define ANNULUS_LIST_16 ANNULUS_LIST_8 "," ANNULUS_D8(8, 9, 10, 11, 12, 13, 14, 15)
#define ANNULUS_LIST_24 ANNULUS_LIST_16 "," ANNULUS_D8(16, 17, 18, 19, 20, 21, 22, 23)
#define ANNULUS_LIST_32 ANNULUS_LIST_24 "," ANNULUS_D8(24, 25, 26, 27, 28, 29, 30, 31)
#define ANNULUS_LIST_40 ANNULUS_LIST_32 "," ANNULUS_D8(32, 33, 34, 35, 36, 37, 38, 39)
#define ANNULUS_LIST_48 ANNULUS_LIST_40 "," ANNULUS_D8(40, 41, 42, 43, 44, 45, 46, 47)
#define ANNULUS_LIST_56 ANNULUS_LIST_48 "," ANNULUS_D8(48, 49, 50, 51, 52, 53, 54, 55)
#define ANNULUS_LIST_64 ANNULUS_LIST_56 "," ANNULUS_D8(56, 57, 58, 59, 60, 61, 62, 63)
#define ANNULUS_LIST_72 ANNULUS_LIST_64 "," ANNULUS_D8(64, 65, 66, 67, 68, 69, 70, 71)
#define ANNULUS_LIST_80 ANNULUS_LIST_72 "," ANNULUS_D8(72, 73, 74, 75, 76, 77, 78, 79)
#define ANNULUS_LIST_88 ANNULUS_LIST_80 "," ANNULUS_D8(80, 81, 82, 83, 84, 85, 86, 87)
#define ANNULUS_LIST_96 ANNULUS_LIST_88 "," ANNULUS_D8(88, 89, 90, 91, 92, 93, 94, 95)
#define ANNULUS_LIST_104 ANNULUS_LIST_96 "," ANNULUS_D8(96, 97, 98, 99, 100, 101, 102, 103)
#define ANNULUS_LIST_112 ANNULUS_LIST_104 "," ANNULUS_D8(104, 105, 106, 107, 108, 109, 110, 111)
#define ANNULUS_LIST_120 ANNULUS_LIST_112 "," ANNULUS_D8(112, 113, 114, 115, 116, 117, 118, 119)
#define ANNULUS_LIST_128 ANNULUS_LIST_120 "," ANNULUS_D8(120, 121, 122, 123, 124, 125, 126, 127)
#define ANNULUS_LIST_12 ANNULUS_LIST_8 ",%8,%9,%10,%11"

#define ANNULUS_F4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define ANNULUS_F8(i) ANNULUS_F4(i), ANNULUS_F4((i) + 4)
#define ANNULUS_BIND_8 ANNULUS_F8(0)
#define ANNULUS_BIND_12 ANNULUS_F8(0), ANNULUS_F4(8)
#define ANNULUS_BIND_16 ANNULUS_BIND_8, ANNULUS_F8(8)
#define ANNULUS_BIND_24 ANNULUS_BIND_16, ANNULUS_F8(16)
#define ANNULUS_BIND_32 ANNULUS_BIND_24, ANNULUS_F8(24)
#define ANNULUS_BIND_40 ANNULUS_BIND_32, ANNULUS_F8(32)
#define ANNULUS_BIND_48 ANNULUS_BIND_40, ANNULUS_F8(40)
#define ANNULUS_BIND_56 ANNULUS_BIND_48, ANNULUS_F8(48)
#define ANNULUS_BIND_64 ANNULUS_BIND_56, ANNULUS_F8(56)
#define ANNULUS_BIND_72 ANNULUS_BIND_64, ANNULUS_F8(64)
#define ANNULUS_BIND_80 ANNULUS_BIND_72, ANNULUS_F8(72)
#define ANNULUS_BIND_88 ANNULUS_BIND_80, ANNULUS_F8(80)
#define ANNULUS_BIND_96 ANNULUS_BIND_88, ANNULUS_F8(88)
#define ANNULUS_BIND_104 ANNULUS_BIND_96, ANNULUS_F8(96)
#define ANNULUS_BIND_112 ANNULUS_BIND_104, ANNULUS_F8(104)
#define ANNULUS_BIND_120 ANNULUS_BIND_112, ANNULUS_F8(112)
#define ANNULUS_BIND_128 ANNULUS_BIND_120, ANNULUS_F8(120)

// R = N / 2 accumulators in a lane; the inputs are operands R, R + 1, ..
#define ANNULUS_PRODUCT(Element, type, N, R, R1, R2, R3, R4, R5)                                                                    \
  template <>                                                                                                                       \
  struct Product<Element, N> {                                                                                                      \
    static __device__ __forceinline__ void shared_a(float (&d)[R], std::uint64_t a, std::uint64_t b, int keep) {                    \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #R2                                                                   \
                   ", 0;\n"                                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" ANNULUS_LIST_##R "}, %" #R ", %" #R1        \
                                                                                                         ", keep, 1, 1, 0, 0;\n}\n" \
                   : ANNULUS_BIND_##R                                                                                               \
                   : "l"(a), "l"(b), "r"(keep));                                                                                    \
    }                                                                                                                               \
    static __device__ __forceinline__ void register_a(float (&d)[R], const std::uint32_t* a, std::uint64_t b, int keep) {           \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #R5                                                                   \
                   ", 0;\n"                                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" ANNULUS_LIST_##R                            \
                   "}, {%" #R ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4 ", keep, 1, 1, 0;\n}\n"                                         \
                   : ANNULUS_BIND_##R                                                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));                                                \
    }                                                                                                                               \
    static __device__ __forceinline__ void register_a_by(float (&d)[R], const std::uint32_t* a, std::uint64_t b) {                  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" ANNULUS_LIST_##R                            \
                   "}, {%" #R ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4 ", 1, 1, 1, 1;\n"                                               \
                   : ANNULUS_BIND_##R                                                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                           \
    }                                                                                                                               \
  };
#define ANNULUS_PRODUCTS(N, R, R1, R2, R3, R4, R5)                 \
  ANNULUS_PRODUCT(__nv_bfloat16, "bf16", N, R, R1, R2, R3, R4, R5) \
  ANNULUS_PRODUCT(__half, "f16", N, R, R1, R2, R3, R4, R5)
ANNULUS_PRODUCTS(16, 8, 9, 10, 11, 12, 13)
ANNULUS_PRODUCTS(24, 12, 13, 14, 15, 16, 17)
ANNULUS_PRODUCTS(32, 16, 17, 18, 19, 20, 21)
ANNULUS_PRODUCTS(48, 24, 25, 26, 27, 28, 29)
ANNULUS_PRODUCTS(64, 32, 33, 34, 35, 36, 37)
ANNULUS_PRODUCTS(96, 48, 49, 50, 51, 52, 53)
ANNULUS_PRODUCTS(128, 64, 65, 66, 67, 68, 69)
ANNULUS_PRODUCTS(256, 128, 129, 130, 131, 132, 133)
#undef ANNULUS_PRODUCTS
#undef ANNULUS_PRODUCT

}  // namespace annulus::kernels::cuda::fused
