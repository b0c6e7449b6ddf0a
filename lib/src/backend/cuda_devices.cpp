// SPDX-License-Identifier: Apache-2.0
#include <annulus/backend/cuda_devices.hpp>

#include <annulus/core/error.hpp>

#include "cuda_handles.hpp"

#include <array>
#include <cstddef>

namespace annulus {
namespace {

std::string version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

/// 0 without a driver.
int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return version;
}

std::string uuid_text(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (std::size_t i = 0; i < sizeof(uuid.bytes); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) { text += '-'; }
    text += fmt::format("{:02x}", static_cast<unsigned>(static_cast<unsigned char>(uuid.bytes[i])));
  }
  return text;
}

}  // namespace

std::string cuda_driver_version() {
  const int version = driver_version();
  return version == 0 ? std::string{} : version_text(version);
}

int require_gpus() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) { return count; }
  static_cast<void>(cudaGetLastError());
  const int driver = driver_version();
  if (driver == 0) { throw InvalidArgument("backend cuda needs an NVIDIA driver, and this machine has none"); }
  if (status == cudaErrorInsufficientDriver) {
    throw InvalidArgument(fmt::format("backend cuda: the driver supports CUDA {}, this binary was built with CUDA {}; update the driver",
                                      version_text(driver), version_text(CUDART_VERSION)));
  }
  if (status == cudaSuccess || status == cudaErrorNoDevice) {
    throw InvalidArgument("backend cuda needs a GPU, and this process sees none (is CUDA_VISIBLE_DEVICES empty?)");
  }
  throw RuntimeFailure(fmt::format("backend cuda: cudaGetDeviceCount failed: {}", cudaGetErrorString(status)));
}

int current_device() {
  int device = 0;
  ANNULUS_CUDA(cudaGetDevice(&device));
  return device;
}

std::string gpu_uuid(int device) {
  cudaDeviceProp properties{};
  ANNULUS_CUDA(cudaGetDeviceProperties(&properties, device));
  return uuid_text(properties.uuid);
}

int device_with_uuid(const std::string& uuid) {
  int count = 0;
  ANNULUS_CUDA(cudaGetDeviceCount(&count));
  for (int device = 0; device < count; ++device) {
    if (gpu_uuid(device) == uuid) { return device; }
  }
  return -1;
}

std::vector<GpuInfo> visible_gpus(GpuQuery query) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return {};
  }
  std::vector<GpuInfo> gpus;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties{};
    ANNULUS_CUDA(cudaGetDeviceProperties(&properties, device));
    std::array<char, 32> pci{};
    ANNULUS_CUDA(cudaDeviceGetPCIBusId(pci.data(), static_cast<int>(pci.size()), device));
    GpuInfo gpu;
    gpu.name = properties.name;
    gpu.uuid = uuid_text(properties.uuid);
    gpu.pci = pci.data();
    gpu.compute_major = properties.major;
    gpu.compute_minor = properties.minor;
    gpu.multiprocessors = properties.multiProcessorCount;
    gpu.l2_bytes = properties.l2CacheSize;
    gpu.total_bytes = checked_narrow<std::int64_t>(properties.totalGlobalMem);
    if (query == GpuQuery::with_free_memory) {
      const DeviceGuard guard(device);
      std::size_t free_bytes = 0;
      std::size_t total_bytes = 0;
      ANNULUS_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
      gpu.free_bytes = checked_narrow<std::int64_t>(free_bytes);
    }
    gpus.push_back(gpu);
  }
  return gpus;
}

}  // namespace annulus
