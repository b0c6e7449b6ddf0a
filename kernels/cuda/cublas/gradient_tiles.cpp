// SPDX-License-Identifier: Apache-2.0
#include "gradient_tiles.hpp"

namespace annulus::kernels::cuda {
namespace {

std::int64_t matrix_bytes(const CublasTiling& tiling) { return round_up(round_up(tiling.rows, 2) * round_up(tiling.k_tile, 128) * 2, 256); }

GradientScratch scratch_of(const CublasTiling& tiling, const GradientTile& tile, std::int64_t floats_of_row, std::byte* memory) {
  return {reinterpret_cast<float*>(memory), reinterpret_cast<float*>(memory + matrix_bytes(tiling)), floats_of_row,
          tile.rows * floats_of_row};
}

/// The stride of a single row means nothing to the caller but must satisfy the library.
std::int64_t leading(std::int64_t stride, std::int64_t count, std::int64_t head_dim) {
  return count > 1 ? stride : std::max(stride, head_dim);
}

/// Where the operands of a tile begin.
struct Operands {
  const std::byte* q;
  const std::byte* k;
  const std::byte* v;
  const std::byte* dout;
  float* dq;
  float* dk;
  float* dv;
  std::int64_t ld_q;
  std::int64_t ld_kv;
  std::int64_t ld_dq;
};

Operands operands_of(const GradientTask& task, const GradientTile& tile) {
  const AttendTask& at = task.attend;
  const std::int64_t q = tile.base.q + tile.q_begin * at.q_strides.row;
  const std::int64_t kv = tile.base.kv + tile.k_begin * at.kv_strides.row;
  const std::int64_t element = size_of(at.dtype);
  const auto in = [&](const void* tensor, std::int64_t offset) { return static_cast<const std::byte*>(tensor) + offset * element; };
  return {in(at.q, q),
          in(at.k, kv),
          in(at.v, kv),
          in(task.dout, q),
          static_cast<float*>(at.acc) + tile.base.acc + tile.q_begin * at.acc_strides.row,
          task.dk + kv,
          task.dv + kv,
          leading(at.q_strides.row, at.q_rows, at.head_dim),
          leading(at.kv_strides.row, at.k_rows, at.head_dim),
          leading(at.acc_strides.row, at.q_rows, at.head_dim)};
}

}  // namespace

std::int64_t gradient_scratch_bytes(const CublasTiling& tiling) { return 2 * matrix_bytes(tiling); }

CublasTiling tiling_of_floats(CublasTiling tiling) {
  tiling.rows = (tiling.rows + 1) / 2;
  return tiling;
}

GradientScratch scratch_of_elements(const CublasTiling& tiling, const GradientTile& tile, std::byte* memory) {
  return scratch_of(tiling, tile, score_row_stride(tile.cols) / 2, memory);
}

GradientScratch scratch_of_floats(const CublasTiling& tiling, const GradientTile& tile, std::byte* memory) {
  return scratch_of(tiling, tile, score_row_stride(tile.cols), memory);
}

GradientOperands gradient_operands(const GradientTask& task, const GradientTile& tile) {
  const Operands at = operands_of(task, tile);
  GradientOperands operands;
  operands.q = at.q;
  operands.dout = at.dout;
  operands.k = at.k;
  operands.v = at.v;
  operands.q_row_stride = task.attend.q_strides.row;
  operands.q_instance_stride = tile.step.q;
  operands.kv_row_stride = task.attend.kv_strides.row;
  operands.kv_instance_stride = tile.step.kv;
  operands.head_dim = to_int(task.attend.head_dim);
  return operands;
}

bool made_at_once(const GradientTask& task) {
  const AttendTask& at = task.attend;
  switch (at.dtype) {
    case DType::fp32:
      return false;
    case DType::fp16:
    case DType::bf16:
      break;
  }
  if (at.head_dim % 8 != 0 || at.head_dim > kMostDimAtOnce) { return false; }
  for (const TaskStrides* strides : {&at.q_strides, &at.kv_strides}) {
    for (const std::int64_t TaskStrides::* stride :
         {&TaskStrides::batch, &TaskStrides::segment, &TaskStrides::row, &TaskStrides::kv_head, &TaskStrides::head}) {
      if (strides->*stride % 8 != 0) { return false; }
    }
  }
  return std::ranges::all_of(std::array<const void*, 4>{at.q, at.k, at.v, task.dout},
                             [](const void* tensor) { return reinterpret_cast<std::uintptr_t>(tensor) % 16 == 0; });
}

// With everything transposed, a row-major matrix [rows, ld] is the column-major one [ld x rows] (see attention.cpp).
std::array<GradientProduct, 2> score_products(const GradientTask& task, const GradientTile& tile, const GradientScratch& scratch) {
  const Operands at = operands_of(task, tile);
  GradientProduct scores;
  scores.a_transposed = true;
  scores.m = tile.cols;
  scores.n = tile.rows;
  scores.k = task.attend.head_dim;
  scores.alpha = static_cast<float>(task.attend.scale);
  scores.a = at.k;
  scores.lda = at.ld_kv;
  scores.stride_a = tile.step.kv;
  scores.b = at.q;
  scores.ldb = at.ld_q;
  scores.stride_b = tile.step.q;
  scores.c = scratch.scores;
  scores.ldc = scratch.ld;
  scores.stride_c = scratch.instance_stride;
  scores.batches = tile.instances;
  GradientProduct products = scores;
  products.alpha = 1.0F;
  products.a = at.v;
  products.b = at.dout;
  products.c = scratch.products;
  return {scores, products};
}

std::array<GradientProduct, 3> gradient_products(const GradientTask& task, const GradientTile& tile, const GradientScratch& scratch) {
  const Operands at = operands_of(task, tile);
  const std::int64_t per_float = 4 / size_of(task.attend.dtype);
  GradientProduct dv;
  dv.b_transposed = true;
  dv.m = task.attend.head_dim;
  dv.n = tile.cols;
  dv.k = tile.rows;
  dv.a = at.dout;
  dv.lda = at.ld_q;
  dv.stride_a = tile.step.q;
  dv.b = scratch.scores;
  dv.ldb = scratch.ld * per_float;
  dv.stride_b = scratch.instance_stride * per_float;
  dv.beta = 1.0F;
  dv.c = at.dv;
  dv.ldc = at.ld_kv;
  dv.stride_c = tile.step.kv;
  dv.batches = tile.instances;
  GradientProduct dk = dv;
  dk.a = at.q;
  dk.b = scratch.products;
  dk.c = at.dk;
  GradientProduct dq = dk;
  dq.b_transposed = false;
  dq.n = tile.rows;
  dq.k = tile.cols;
  dq.a = at.k;
  dq.lda = at.ld_kv;
  dq.stride_a = tile.step.kv;
  dq.c = at.dq;
  dq.ldc = at.ld_dq;
  dq.stride_c = tile.step.acc;
  return {dv, dk, dq};
}

}  // namespace annulus::kernels::cuda
