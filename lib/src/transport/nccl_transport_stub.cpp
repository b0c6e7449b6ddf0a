// SPDX-License-Identifier: Apache-2.0
// Linked instead of nccl_transport.cpp in a build with CUDA and without NCCL.
#include <annulus/core/error.hpp>
#include <annulus/transport/gpu_transports.hpp>

namespace annulus {

std::unique_ptr<Transport> make_nccl_transport(const Communicator& /*comm*/, Device& /*device*/, bool /*share_gpu*/) {
  throw NotCompiled("transport nccl is not compiled into this binary; it has: self, loopback, mpi, p2p");
}

bool has_nccl_transport() { return false; }

void prepare_gpu_sharing() {}

}  // namespace annulus
