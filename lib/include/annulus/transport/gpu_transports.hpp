// SPDX-License-Identifier: Apache-2.0
// The transports that move memory of GPUs between processes. In a build without them these functions throw NotCompiled.
#pragma once

#include <annulus/device/device.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include <memory>
#include <string>

namespace annulus {

/// Tells NCCL, through the environment, that ranks may share GPUs, where this host has fewer than the launcher started ranks on it (or it
/// is not known): then NCCL takes them for hosts of their own and goes through sockets. Call it in a process that is to use `share_gpu`,
/// before MPI_Init and any thread, since others may read the environment from then on. Does nothing in a build without nccl.
/// @throws RuntimeFailure if the environment cannot be changed
void prepare_gpu_sharing();

/// NCCL: grouped sends and receives of a step on a stream of its own; any hosts. `share_gpu`: ranks may share a GPU, which NCCL otherwise
/// refuses; prepare_gpu_sharing() must have been called. Collective; the device must outlive the transport.
/// @throws NotCompiled; RuntimeFailure if NCCL does not start
std::unique_ptr<Transport> make_nccl_transport(const Communicator& comm, Device& device, bool share_gpu);

/// Copy engines push into the peers' memory, mapped by CUDA IPC; inside one host. Receive ranges must lie in memory of MemoryUse::slot and
/// must be announced by prepare(). Collective; the device must outlive the transport.
/// @throws NotCompiled; InvalidArgument, on all ranks, with the reason of p2p_obstacle()
std::unique_ptr<Transport> make_p2p_transport(const Communicator& comm, Device& device);

/// MPI with device memory: directly if the MPI library takes device pointers, else through pinned memory, by a thread of its own.
/// Collective; the device must outlive the transport.
/// @throws NotCompiled
std::unique_ptr<Transport> make_device_mpi_transport(const Communicator& comm, Device& device);

/// Why transport p2p cannot connect these ranks, each on its GPU; empty if it can. The same on all ranks. Collective.
std::string p2p_obstacle(const Communicator& comm, Device& device);

/// Whether this binary has transport nccl.
bool has_nccl_transport();

}  // namespace annulus
