// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"
#include "row_layout.cuh"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace annulus::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsAtOnce = 4;
constexpr std::uint32_t kUnitsPerBlock = kThreads * kUnitsAtOnce;
constexpr int kMostBoxes = 32;

/// rows x heads chunks of divide_units.divisor() units each, from strided chunks to contiguous ones. Strides count units.
struct PackBox {
  const void* src = nullptr;
  void* dst = nullptr;
  FastDivide divide_units;
  FastDivide divide_heads;
  std::uint32_t count = 0;        ///< units
  std::uint32_t first_block = 0;  ///< of the launch
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
};

struct PackBoxes {
  int count = 0;
  PackBox box[kMostBoxes];
};

template <class Unit>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackBoxes boxes) {
  // The last box that starts at this block or before.
  int at = 0;
  for (int step = kMostBoxes / 2; step > 0; step /= 2) {
    if (at + step < boxes.count && boxes.box[at + step].first_block <= blockIdx.x) { at += step; }
  }
  const PackBox& box = boxes.box[at];
  const auto* __restrict__ src = static_cast<const Unit*>(box.src);
  auto* __restrict__ dst = static_cast<Unit*>(box.dst);
  const std::uint32_t first = (blockIdx.x - box.first_block) * kUnitsPerBlock + threadIdx.x;
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

/// Collects boxes of one unit into launches.
class PackLaunches {
 public:
  explicit PackLaunches(CUstream_st* stream) : stream_(stream) {}

  void add(const PackBox& box, std::int64_t unit_bytes) {
    if (boxes_.count == kMostBoxes || unit_bytes != unit_bytes_) { launch(); }
    unit_bytes_ = unit_bytes;
    PackBox& added = boxes_.box[boxes_.count++];
    added = box;
    added.first_block = blocks_;
    blocks_ += (box.count + kUnitsPerBlock - 1) / kUnitsPerBlock;
  }
  void launch() {
    if (boxes_.count == 0) { return; }
    if (unit_bytes_ == 16) {
      pack_kernel<uint4><<<blocks_, kThreads, 0, stream_>>>(boxes_);
    } else if (unit_bytes_ == 4) {
      pack_kernel<unsigned><<<blocks_, kThreads, 0, stream_>>>(boxes_);
    } else {
      pack_kernel<unsigned short><<<blocks_, kThreads, 0, stream_>>>(boxes_);
    }
    check_launch("pack_kernel");
    boxes_.count = 0;
    blocks_ = 0;
  }

 private:
  CUstream_st* stream_;
  std::int64_t unit_bytes_ = 0;
  std::uint32_t blocks_ = 0;
  PackBoxes boxes_;
};

/// Largest unit, in bytes, of which every address and stride is a multiple.
std::int64_t unit_of(const PackTask& task) {
  for (const std::int64_t bytes : {16, 4}) {
    const auto fits = [&](std::int64_t elements) { return elements * task.element_size % bytes == 0; };
    const bool aligned =
        is_aligned(task.src, static_cast<std::uintptr_t>(bytes)) && is_aligned(task.dst, static_cast<std::uintptr_t>(bytes));
    if (aligned && fits(task.head_dim) && fits(task.src_batch_stride) && fits(task.src_row_stride) && fits(task.src_head_stride)) {
      return bytes;
    }
  }
  return 2;
}

void add_boxes(const PackTask& task, PackLaunches& launches) {
  constexpr std::int64_t kMostUnits = std::int64_t{1} << 30;
  const std::int64_t unit_bytes = unit_of(task);
  const auto in_units = [&](std::int64_t elements) { return elements * task.element_size / unit_bytes; };
  // Neighbouring heads are one longer chunk.
  const bool whole_rows = task.src_head_stride == task.head_dim || task.heads == 1;
  const std::int64_t heads = whole_rows ? 1 : task.heads;
  const std::int64_t units = in_units(whole_rows ? task.heads * task.head_dim : task.head_dim);
  const std::int64_t row_bytes = heads * units * unit_bytes;
  const std::int64_t rows_step = std::clamp<std::int64_t>(kMostUnits / (heads * units), 1, task.rows);
  for (std::int64_t b = 0; b < task.batch; ++b) {
    for (std::int64_t row = 0; row < task.rows; row += rows_step) {
      const std::int64_t rows = std::min(rows_step, task.rows - row);
      PackBox box;
      box.src = static_cast<const std::byte*>(task.src) + (b * task.src_batch_stride + row * task.src_row_stride) * task.element_size;
      box.dst = static_cast<std::byte*>(task.dst) + (b * task.rows + row) * row_bytes;
      box.divide_units = FastDivide(static_cast<std::uint32_t>(units));
      box.divide_heads = FastDivide(static_cast<std::uint32_t>(heads));
      box.count = static_cast<std::uint32_t>(rows * heads * units);
      box.row_stride = in_units(task.src_row_stride);
      box.head_stride = in_units(task.src_head_stride);
      launches.add(box, unit_bytes);
    }
  }
}

}  // namespace

void pack(std::span<const PackTask> tasks, CUstream_st* stream) {
  PackLaunches launches(stream);
  for (const PackTask& task : tasks) {
    if (task.batch > 0 && task.rows > 0 && task.heads > 0 && task.head_dim > 0) { add_boxes(task, launches); }
  }
  launches.launch();
}

}  // namespace annulus::kernels::cuda
