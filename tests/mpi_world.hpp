// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/job/communicator.hpp>

namespace annulus::test {

/// All ranks of a test that scripts/launch starts. There is one for the whole program: making it is collective, and so is ending it.
const Communicator& world();

}  // namespace annulus::test
