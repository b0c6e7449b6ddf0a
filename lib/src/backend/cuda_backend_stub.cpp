// SPDX-License-Identifier: Apache-2.0
// Linked instead of cuda_backend.cpp in a build without CUDA.
#include <annulus/backend/cuda_backend.hpp>
#include <annulus/core/error.hpp>

namespace annulus {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& /*options*/) {
  throw NotCompiled("backend cuda is not compiled into this binary; it has: reference, cpu");
}

}  // namespace annulus
