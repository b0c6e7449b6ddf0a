// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/kernel_table.hpp>

#include <annulus/core/build_info.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/kernels/built_for.hpp>
#include <annulus/kernels/cpu.hpp>
#include <annulus/kernels/fused_tile.hpp>

namespace annulus {

namespace {

std::string hopper_obstacle() {
  std::string obstacle = gpu_obstacle();
  if (!obstacle.empty()) { return obstacle; }
  return sees_only_hopper() ? "" : "not all GPUs here have compute capability 9.0 (Hopper)";
}

}  // namespace

std::vector<KernelInfo> kernel_table() {
  KernelInfo common;
  common.dtypes.assign(kernels::kBuiltDTypes.begin(), kernels::kBuiltDTypes.end());
  common.largest_head_dim = kernels::kLargestHeadDim;

  KernelInfo reference = common;
  reference.backend = BackendKind::reference;
  reference.kernel = "loops";
  reference.products = "plain loops in fp64";

  KernelInfo cpu = common;
  cpu.backend = BackendKind::cpu;
  cpu.kernel = "tiles";
  cpu.fast = FastHeadDims::all;
  cpu.products = kernels::cpu::describe() + "; in fp32, 16-bit inputs are widened";
  if (!kernels::cpu::supported()) { cpu.obstacle = "this CPU has neither AVX2 (with FMA and F16C) nor AVX-512"; }

  std::vector<KernelInfo> table{reference, cpu};
  if (build_info().cuda.empty()) { return table; }
  KernelInfo cublas = common;
  cublas.backend = BackendKind::cuda;
  cublas.kernel = to_string(KernelKind::cublas);
  cublas.fast = FastHeadDims::listed;
  cublas.fast_head_dims.assign(kernels::kTunedHeadDims.begin(), kernels::kTunedHeadDims.end());
  cublas.products = "cuBLAS; 16-bit inputs on tensor cores, fp32 in fp32, sums in fp32";
  cublas.obstacle = gpu_obstacle();
  table.push_back(cublas);

  KernelInfo fused = common;
  fused.backend = BackendKind::cuda;
  fused.kernel = to_string(KernelKind::fused);
  fused.dtypes = {DType::fp16, DType::bf16};
  fused.head_dim_step = 8;
  fused.fast = FastHeadDims::listed;
  for (const kernels::cuda::fused::TileShape& shape : kernels::cuda::fused::kTileShapes) { fused.fast_head_dims.push_back(shape.head_dim); }
  fused.products = "tensor cores of Hopper, sums in fp32";
  fused.obstacle = hopper_obstacle();
  table.push_back(fused);
  return table;
}

}  // namespace annulus
