// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace annulus {

/// One GPU that this process may use; its index in the list is its CUDA device number.
struct GpuInfo {
  std::string name;  ///< "NVIDIA H100 80GB HBM3"
  std::string uuid;  ///< "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx": the same on every process and host
  std::string pci;   ///< "0000:1b:00.0"
  int compute_major = 0;
  int compute_minor = 0;
  int multiprocessors = 0;
  std::int64_t l2_bytes = 0;
  std::int64_t total_bytes = 0;
  std::int64_t free_bytes = 0;  ///< 0 unless asked for
  int clock_mhz = 0;            ///< the highest that the driver lets it run at
  int memory_clock_mhz = 0;     ///< likewise
  bool ecc = false;             ///< whether its memory corrects errors
};

/// What to find out. Free memory needs a context on every GPU, which takes time and some of that memory.
enum class GpuQuery { properties, with_free_memory };

/// Asks CUDA, through the environment, for as many connections to a GPU as it has (32, unless CUDA_DEVICE_MAX_CONNECTIONS is set; CUDA's
/// own default is 8): a rank has over a dozen streams, and those that share a connection wait for each other. Call it before anything else
/// of CUDA, MPI or a thread. Does nothing in a build without CUDA.
/// @throws RuntimeFailure if the environment cannot be changed
void prepare_gpu_connections();

/// GPUs in CUDA's order. Empty without a driver, without a GPU and in a build without CUDA; never throws for these.
/// @throws RuntimeFailure if a GPU that is there cannot be asked
std::vector<GpuInfo> visible_gpus(GpuQuery query = GpuQuery::properties);

/// Whether there are visible GPUs, all of them of compute capability 9.0.
/// @throws RuntimeFailure as visible_gpus()
bool sees_only_hopper();

/// Why visible_gpus() is empty: no driver, one too old, no GPU, or a build without CUDA; empty if there is a GPU. Never throws.
std::string gpu_obstacle();

/// How one GPU reaches another, as the CUDA runtime says; from and to are CUDA device numbers.
struct GpuLink {
  int from = 0;
  int to = 0;
  bool peer_access = false;             ///< kernels and copies of `from` can address the memory of `to`
  std::optional<int> performance_rank;  ///< of the link, among all of this machine: 0 is the fastest; unset where CUDA does not say
  std::optional<bool> native_atomics;   ///< whether atomic operations work over the link; unset where CUDA does not say
};

/// Links between all pairs of visible GPUs, both ways, by (from, to). Empty where visible_gpus() is, and with one GPU.
/// @throws RuntimeFailure if a GPU that is there cannot be asked
std::vector<GpuLink> gpu_links();

/// Version of the CUDA driver as "13.0"; empty without a driver and in a build without CUDA.
std::string cuda_driver_version();

}  // namespace annulus
