// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include <annulus/backend/backend.hpp>

namespace annulus {

/// The CUDA device that a backend's memory lies on.
/// @throws InvalidArgument for a backend other than cuda
int device_of(Backend& backend);

/// The UUID of a device.
std::string gpu_uuid(int device);

/// The device with this UUID among those that this process sees; -1 if it sees none.
int device_with_uuid(const std::string& uuid);

}  // namespace annulus
