// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/job/communicator.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace annulus {

/// What one rank knows of the GPUs it might use.
struct GpuClaim {
  std::string host;
  std::int64_t host_rank = 0;
  std::int64_t host_size = 1;      ///< ranks on the host
  std::vector<std::string> uuids;  ///< of the GPUs it can see, by device number
};

/// The CUDA device of every rank: 0 where the launcher shows it only one, else the node-local rank's; with `share_gpu` ranks go round the
/// GPUs they see.
/// @param claims by rank
/// @throws InvalidArgument if a rank sees no GPU, or, without `share_gpu` and naming it, if a rank sees fewer GPUs than its host has ranks
/// or two ranks
///   would have one GPU (by UUID)
std::vector<int> choose_devices(std::span<const GpuClaim> claims, bool share_gpu);

/// The CUDA device of this rank by choose_devices() over all ranks. Collective.
/// @throws AgreedError that names --share-gpu, or what this binary has if it has no CUDA
int assign_gpu(const Communicator& comm, bool share_gpu);

/// Ranks of the job, this one included, whose GPU is this rank's device. Collective.
std::int64_t ranks_on_gpu(const Communicator& comm, int device);

}  // namespace annulus
