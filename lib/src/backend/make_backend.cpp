// SPDX-License-Identifier: Apache-2.0
#include <annulus/backend/backend.hpp>
#include <annulus/backend/cuda_backend.hpp>

#include "host_backend.hpp"

namespace annulus {

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  switch (options.kind) {
    case BackendKind::cuda:
      return make_cuda_backend(options);
    case BackendKind::reference:
    case BackendKind::cpu:
      break;
  }
  return std::make_unique<HostBackend>(options.kind, options.threads);
}

}  // namespace annulus
