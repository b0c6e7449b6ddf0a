// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "check.hpp"
#include "row_layout.cuh"

namespace annulus::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsAtOnce = 4;

/// One launch: rows x heads chunks of `units` units each, from strided chunks to contiguous ones. Strides count units.
struct PackBox {
  FastDivide divide_units;
  FastDivide divide_heads;
  std::uint32_t count;
  std::int64_t row_stride;
  std::int64_t head_stride;
};

template <class Unit>
__global__ void __launch_bounds__(kThreads) pack_kernel(const PackBox box, const Unit* __restrict__ src, Unit* __restrict__ dst) {
  const std::uint32_t first = blockIdx.x * (kThreads * kUnitsAtOnce) + threadIdx.x;
  Unit units[kUnitsAtOnce];
#pragma unroll
  for (int u = 0; u < kUnitsAtOnce; ++u) {
    const std::uint32_t index = first + static_cast<std::uint32_t>(u * kThreads);
    if (index < box.count) {
      const std::uint32_t chunk = box.divide_units(index);
      const std::uint32_t within = index - chunk * box.divide_units.divisor();
      const std::uint32_t row = box.divide_heads(chunk);
      const std::uint32_t head = chunk - row * box.divide_heads.divisor();
      units[u] = __ldg(src + row * box.row_stride + head * box.head_stride + within);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnitsAtOnce; ++u) {
    const std::uint32_t index = first + static_cast<std::uint32_t>(u * kThreads);
    if (index < box.count) { dst[index] = units[u]; }
  }
}

/// Packs in units of `Unit`, of which every address and stride is a multiple.
template <class Unit>
void pack_in(const PackTask& task, CUstream_st* stream) {
  constexpr std::int64_t kMostUnits = std::int64_t{1} << 30;
  constexpr auto kUnitBytes = static_cast<std::int64_t>(sizeof(Unit));
  const auto in_units = [&](std::int64_t elements) { return elements * task.element_size / kUnitBytes; };
  // Neighbouring heads are one longer chunk.
  const bool whole_rows = task.src_head_stride == task.head_dim || task.heads == 1;
  const std::int64_t heads = whole_rows ? 1 : task.heads;
  const std::int64_t units = in_units(whole_rows ? task.heads * task.head_dim : task.head_dim);
  const std::int64_t row_units = heads * units;
  const std::int64_t rows_step = std::clamp<std::int64_t>(kMostUnits / row_units, 1, task.rows);
  for (std::int64_t b = 0; b < task.batch; ++b) {
    for (std::int64_t row = 0; row < task.rows; row += rows_step) {
      const std::int64_t rows = std::min(rows_step, task.rows - row);
      const PackBox box{FastDivide(static_cast<std::uint32_t>(units)), FastDivide(static_cast<std::uint32_t>(heads)),
                        static_cast<std::uint32_t>(rows * row_units), in_units(task.src_row_stride), in_units(task.src_head_stride)};
      const std::uint32_t per_block = kThreads * kUnitsAtOnce;
      pack_kernel<Unit><<<(box.count + per_block - 1) / per_block, kThreads, 0, stream>>>(
          box, static_cast<const Unit*>(task.src) + in_units(b * task.src_batch_stride + row * task.src_row_stride),
          static_cast<Unit*>(task.dst) + (b * task.rows + row) * row_units);
      check_launch("pack_kernel");
    }
  }
}

}  // namespace

void pack(const PackTask& task, CUstream_st* stream) {
  if (task.batch <= 0 || task.rows <= 0 || task.heads <= 0 || task.head_dim <= 0) { return; }
  const auto all_multiples_of = [&](std::int64_t bytes) {
    const auto fits = [&](std::int64_t elements) { return elements * task.element_size % bytes == 0; };
    return is_aligned(task.src, static_cast<std::uintptr_t>(bytes)) && is_aligned(task.dst, static_cast<std::uintptr_t>(bytes)) &&
           fits(task.head_dim) && fits(task.src_batch_stride) && fits(task.src_row_stride) && fits(task.src_head_stride);
  };
  if (all_multiples_of(16)) {
    pack_in<uint4>(task, stream);
  } else if (all_multiples_of(4)) {
    pack_in<unsigned>(task, stream);
  } else {
    pack_in<unsigned short>(task, stream);
  }
}

}  // namespace annulus::kernels::cuda
