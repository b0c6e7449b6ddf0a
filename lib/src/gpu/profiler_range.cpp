// SPDX-License-Identifier: Apache-2.0
#include "profiler_range.hpp"

#include <nvtx3/nvToolsExt.h>

namespace annulus {

void push_profiler_range(const char* name) noexcept { static_cast<void>(nvtxRangePushA(name)); }
void pop_profiler_range() noexcept { static_cast<void>(nvtxRangePop()); }

}  // namespace annulus
