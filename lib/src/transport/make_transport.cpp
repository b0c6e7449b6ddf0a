// SPDX-License-Identifier: Apache-2.0
#include <annulus/transport/make_transport.hpp>

#include <annulus/core/error.hpp>
#include <annulus/transport/gpu_transports.hpp>

#include "mpi_transport.hpp"
#include "self_transport.hpp"

namespace annulus {

TransportKind gpu_transport_without_p2p() { return has_nccl_transport() ? TransportKind::nccl : TransportKind::mpi; }

TransportKind choose_gpu_transport(const Communicator& comm, Device& device) {
  if (p2p_obstacle(comm, device).empty()) { return TransportKind::p2p; }
  return gpu_transport_without_p2p();
}

std::unique_ptr<Transport> make_transport(TransportKind kind, const Communicator& comm, Device& device, bool share_gpu) {
  const bool on_gpu = !device.host_memory();
  if (kind == TransportKind::automatic) {
    kind = comm.size() == 1 ? TransportKind::self : (on_gpu ? choose_gpu_transport(comm, device) : TransportKind::mpi);
  }
  switch (kind) {
    case TransportKind::self:
      ANNULUS_EXPECTS(comm.size() == 1, "transport self is for one rank, and there are {}; use mpi", comm.size());
      return std::make_unique<SelfTransport>();
    case TransportKind::mpi:
      if (on_gpu) { return make_device_mpi_transport(comm, device); }
      return std::make_unique<MpiTransport>(comm);
    case TransportKind::nccl:
      ANNULUS_EXPECTS(on_gpu, "transport nccl moves GPU memory, and backend {} has none", to_string(device.kind()));
      return make_nccl_transport(comm, device, share_gpu);
    case TransportKind::p2p:
      ANNULUS_EXPECTS(on_gpu, "transport p2p moves GPU memory, and backend {} has none", to_string(device.kind()));
      return make_p2p_transport(comm, device);
    case TransportKind::loopback:
    case TransportKind::automatic:
      break;
  }
  throw InvalidArgument("transport loopback is for --virtual-ranks in one process");
}

}  // namespace annulus
