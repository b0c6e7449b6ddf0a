// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace annulus {

/// Requires that each thread of a team of `threads` has the stack that kernels need: less of it is overrun, into whatever lies beside it,
/// and results may be wrong. OMP_STACKSIZE and the limit on stacks (ulimit -s) decide how much there is.
/// @throws InvalidArgument with what there is and what sets it
void require_thread_stacks(int threads);

}  // namespace annulus
