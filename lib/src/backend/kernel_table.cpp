// SPDX-License-Identifier: Apache-2.0
#include <annulus/backend/kernel_table.hpp>

#include <annulus/backend/cuda_devices.hpp>
#include <annulus/core/build_info.hpp>
#include <annulus/kernels/built_for.hpp>
#include <annulus/kernels/cpu.hpp>

namespace annulus {

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
  for (const auto& [kind, name] : EnumNames<KernelKind>::values) {
    KernelInfo cuda = common;
    cuda.backend = BackendKind::cuda;
    cuda.kernel = name;
    cuda.fast = FastHeadDims::listed;
    cuda.fast_head_dims.assign(kernels::kTunedHeadDims.begin(), kernels::kTunedHeadDims.end());
    cuda.products = "cuBLAS; 16-bit inputs on tensor cores, fp32 in fp32, sums in fp32";
    cuda.obstacle = gpu_obstacle();
    table.push_back(std::move(cuda));
  }
  return table;
}

}  // namespace annulus
