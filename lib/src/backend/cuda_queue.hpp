// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/backend/backend.hpp>

#include <cuda_runtime_api.h>

namespace annulus {

/// The stream under a queue of backend cuda.
/// @throws AssertionFailure for a queue of another backend
cudaStream_t stream_of(Queue& queue);

}  // namespace annulus
