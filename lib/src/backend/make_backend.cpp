// SPDX-License-Identifier: Apache-2.0
#include <annulus/backend/backend.hpp>
#include <annulus/backend/cuda_backend.hpp>

#include "host_backend.hpp"

namespace annulus {

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  switch (options.kind) {
    case BackendKind::reference:
      return make_reference_backend(options);
    case BackendKind::cuda:
      return make_cuda_backend(options);
    case BackendKind::cpu:
      break;
  }
  return make_cpu_backend(options);
}

}  // namespace annulus
