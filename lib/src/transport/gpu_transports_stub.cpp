// SPDX-License-Identifier: Apache-2.0
// Linked in a build without CUDA.
#include <annulus/core/error.hpp>
#include <annulus/transport/gpu_transports.hpp>

namespace annulus {

namespace {

[[noreturn]] void refuse(const char* what) {
  throw NotCompiled(std::string(what) +
                    " is not compiled into this binary; its backends are reference and cpu, its transports self, loopback and mpi");
}

}  // namespace

std::unique_ptr<Transport> make_nccl_transport(const Communicator& /*comm*/, Device& /*device*/, bool /*share_gpu*/) {
  refuse("transport nccl");
}
std::unique_ptr<Transport> make_p2p_transport(const Communicator& /*comm*/, Device& /*device*/) { refuse("transport p2p"); }
std::unique_ptr<Transport> make_device_mpi_transport(const Communicator& /*comm*/, Device& /*device*/) {
  refuse("device memory for transport mpi");
}
std::string p2p_obstacle(const Communicator& /*comm*/, Device& /*device*/) { return "this binary has no CUDA"; }
bool has_nccl_transport() { return false; }

void prepare_gpu_sharing() {}

}  // namespace annulus
