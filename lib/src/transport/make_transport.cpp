// SPDX-License-Identifier: Apache-2.0
#include <annulus/transport/make_transport.hpp>

#include <annulus/core/error.hpp>
#include <annulus/transport/gpu_transports.hpp>

#include "mpi_transport.hpp"
#include "self_transport.hpp"

namespace annulus {

TransportKind choose_gpu_transport(const Communicator& comm, Backend& backend) {
  if (p2p_obstacle(comm, backend).empty()) { return TransportKind::p2p; }
  return has_nccl_transport() ? TransportKind::nccl : TransportKind::mpi;
}

std::unique_ptr<Transport> make_transport(TransportKind kind, const Communicator& comm, Backend& backend, bool share_gpu) {
  const bool device = !backend.host_memory();
  if (kind == TransportKind::automatic) {
    kind = comm.size() == 1 ? TransportKind::self : (device ? choose_gpu_transport(comm, backend) : TransportKind::mpi);
  }
  switch (kind) {
    case TransportKind::self:
      ANNULUS_EXPECTS(comm.size() == 1, "transport self is for one rank, and there are {}; use mpi", comm.size());
      return std::make_unique<SelfTransport>();
    case TransportKind::mpi:
      if (device) { return make_device_mpi_transport(comm, backend); }
      return std::make_unique<MpiTransport>(comm);
    case TransportKind::nccl:
      ANNULUS_EXPECTS(device, "transport nccl moves GPU memory, and backend {} has none", to_string(backend.kind()));
      return make_nccl_transport(comm, backend, share_gpu);
    case TransportKind::p2p:
      ANNULUS_EXPECTS(device, "transport p2p moves GPU memory, and backend {} has none", to_string(backend.kind()));
      return make_p2p_transport(comm, backend);
    case TransportKind::loopback:
    case TransportKind::automatic:
      break;
  }
  throw InvalidArgument("transport loopback is for --virtual-ranks in one process");
}

}  // namespace annulus
