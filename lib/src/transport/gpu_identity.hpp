// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/backend/backend.hpp>

namespace annulus {

/// The CUDA device that a backend's memory lies on.
/// @throws InvalidArgument for a backend other than cuda
int device_of(Backend& backend);

}  // namespace annulus
