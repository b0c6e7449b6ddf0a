// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace annulus::test {

inline constexpr int kPassed = 0;
inline constexpr int kFailed = 1;
inline constexpr int kSkipped = 77;  ///< ctest's SKIP_RETURN_CODE

/// Runs the selected cases; kPassed, kFailed or kSkipped. A run without a case is a failure.
int run_session(int argc, char** argv);

}  // namespace annulus::test
