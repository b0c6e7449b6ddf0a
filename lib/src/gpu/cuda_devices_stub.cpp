// SPDX-License-Identifier: Apache-2.0
#include <annulus/gpu/cuda_devices.hpp>

namespace annulus {

void prepare_gpu_connections() {}

std::vector<GpuInfo> visible_gpus(GpuQuery /*query*/) { return {}; }

bool sees_only_hopper() { return false; }

std::string gpu_obstacle() { return "this binary is built without CUDA"; }

std::vector<GpuLink> gpu_links() { return {}; }

std::string cuda_driver_version() { return {}; }

}  // namespace annulus
