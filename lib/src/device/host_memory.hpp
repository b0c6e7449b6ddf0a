// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace annulus {

/// Bytes of host memory that this process could still take: what the system has to give, and what the limits of the process's control
/// groups (a batch job's, a container's) leave.
std::int64_t available_host_memory();

}  // namespace annulus
