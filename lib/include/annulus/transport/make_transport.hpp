// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/device/device.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/transport.hpp>

#include <cstdint>
#include <memory>
#include <vector>

namespace annulus {

/// The transports of `ranks` virtual ranks inside this process: messages are copies on a queue of `device`, which must outlive them. Rank
/// i's is element i. All ranks must call post(step) before any calls wait(step).
std::vector<std::unique_ptr<Transport>> make_loopback_transports(std::int64_t ranks, Device& device);

/// What TransportKind::automatic means for several ranks on GPUs: p2p inside one host where peers reach each other, else nccl where it is
/// compiled in, else mpi. Each rank's GPU is its device. Collective.
TransportKind choose_gpu_transport(const Communicator& comm, Device& device);

/// The same where p2p cannot serve.
TransportKind gpu_transport_without_p2p();

/// The transport of this process. Collective over `comm`. `automatic` takes `self` for one rank, else what suits the device.
/// @throws NotCompiled if this binary lacks it, InvalidArgument if it does not suit the communicator or device
std::unique_ptr<Transport> make_transport(TransportKind kind, const Communicator& comm, Device& device, bool share_gpu);

}  // namespace annulus
