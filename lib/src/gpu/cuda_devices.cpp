// SPDX-License-Identifier: Apache-2.0
#include <annulus/gpu/cuda_devices.hpp>

#include <annulus/core/error.hpp>

#include "gpu/cuda_handles.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>

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

/// How many GPUs this process sees, or why it sees none.
struct GpuCount {
  int count = 0;
  std::string obstacle;
  bool broken = false;  ///< the machine's fault, rather than something that is simply not there
};

GpuCount count_gpus() {
  GpuCount found;
  const cudaError_t status = cudaGetDeviceCount(&found.count);
  if (status == cudaSuccess && found.count > 0) { return found; }
  static_cast<void>(cudaGetLastError());
  found.count = 0;
  const int driver = driver_version();
  if (driver == 0) {
    found.obstacle = "this machine has no NVIDIA driver";
  } else if (status == cudaErrorInsufficientDriver) {
    found.obstacle = fmt::format("the driver supports CUDA {}, this binary was built with CUDA {}; update the driver", version_text(driver),
                                 version_text(CUDART_VERSION));
  } else if (status == cudaSuccess || status == cudaErrorNoDevice) {
    found.obstacle = "this process sees none (is CUDA_VISIBLE_DEVICES empty?)";
  } else {
    found.obstacle = fmt::format("cudaGetDeviceCount failed: {}", cudaGetErrorString(status));
    found.broken = true;
  }
  return found;
}

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  ANNULUS_CUDA(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

/// An attribute of the link between two GPUs; nothing where CUDA has none.
std::optional<int> link_attribute(cudaDeviceP2PAttr attribute, int from, int to) {
  int value = 0;
  if (cudaDeviceGetP2PAttribute(&value, attribute, from, to) == cudaSuccess) { return value; }
  static_cast<void>(cudaGetLastError());
  return std::nullopt;
}

}  // namespace

std::string cuda_driver_version() {
  const int version = driver_version();
  return version == 0 ? std::string{} : version_text(version);
}

int require_gpus() {
  const GpuCount found = count_gpus();
  if (!found.obstacle.empty()) {
    const std::string message = "backend cuda needs a GPU: " + found.obstacle;
    if (found.broken) { throw RuntimeFailure(message); }
    throw InvalidArgument(message);
  }
  return found.count;
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

void prepare_gpu_connections() {
  constexpr const char* kVariable = "CUDA_DEVICE_MAX_CONNECTIONS";
  if (setenv(kVariable, "32", 0) != 0) { throw RuntimeFailure(fmt::format("cannot set {} in the environment", kVariable)); }
}

std::vector<GpuInfo> visible_gpus(GpuQuery query) {
  const int count = count_gpus().count;
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
    constexpr int kKhzPerMhz = 1000;
    gpu.clock_mhz = attribute_of(device, cudaDevAttrClockRate) / kKhzPerMhz;
    gpu.memory_clock_mhz = attribute_of(device, cudaDevAttrMemoryClockRate) / kKhzPerMhz;
    gpu.ecc = attribute_of(device, cudaDevAttrEccEnabled) != 0;
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

bool sees_only_hopper() {
  const std::vector<GpuInfo> gpus = visible_gpus();
  return !gpus.empty() &&
         std::all_of(gpus.begin(), gpus.end(), [](const GpuInfo& gpu) { return gpu.compute_major == 9 && gpu.compute_minor == 0; });
}

std::string gpu_obstacle() { return count_gpus().obstacle; }

std::vector<GpuLink> gpu_links() {
  const int count = count_gpus().count;
  std::vector<GpuLink> links;
  for (int from = 0; from < count; ++from) {
    for (int to = 0; to < count; ++to) {
      if (from == to) { continue; }
      int reachable = 0;
      ANNULUS_CUDA(cudaDeviceCanAccessPeer(&reachable, from, to));
      GpuLink link{from, to, reachable != 0, link_attribute(cudaDevP2PAttrPerformanceRank, from, to), std::nullopt};
      if (const auto atomics = link_attribute(cudaDevP2PAttrNativeAtomicSupported, from, to)) { link.native_atomics = *atomics != 0; }
      links.push_back(link);
    }
  }
  return links;
}

}  // namespace annulus
