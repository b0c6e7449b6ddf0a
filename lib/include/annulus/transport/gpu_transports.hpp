// SPDX-License-Identifier: Apache-2.0
// The transports that move memory of the cuda backend between processes. In a build without them these functions throw NotCompiled.
#pragma once

#include <annulus/backend/backend.hpp>
#include <annulus/transport/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include <memory>
#include <string>

namespace annulus {

/// NCCL: grouped sends and receives of a step on a stream of its own; any hosts. With `share_gpu`, ranks that share a GPU are made to look
/// like hosts of their own to NCCL, which otherwise refuses them, and NCCL then goes through sockets. Collective; the backend must outlive
/// the transport.
/// @throws NotCompiled; RuntimeFailure if NCCL does not start
std::unique_ptr<Transport> make_nccl_transport(const Communicator& comm, Backend& backend, bool share_gpu);

/// Copy engines push into the peers' memory, mapped by CUDA IPC; inside one host. Receive ranges must lie in memory of MemoryUse::slot and
/// must be announced by prepare(). Collective; the backend must outlive the transport.
/// @throws NotCompiled; InvalidArgument, on all ranks, with the reason of p2p_obstacle()
std::unique_ptr<Transport> make_p2p_transport(const Communicator& comm, Backend& backend);

/// MPI with device memory: directly if the MPI library takes device pointers, else through pinned memory, by a thread of its own.
/// Collective; the backend must outlive the transport.
/// @throws NotCompiled
std::unique_ptr<Transport> make_device_mpi_transport(const Communicator& comm, Backend& backend);

/// Why transport p2p cannot connect these ranks, each on its backend's GPU; empty if it can. The same on all ranks. Collective.
std::string p2p_obstacle(const Communicator& comm, Backend& backend);

/// Whether this binary has transport nccl.
bool has_nccl_transport();

}  // namespace annulus
