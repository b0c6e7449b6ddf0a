// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>

namespace annulus {

/// Times and bytes of one step of one rank.
struct StepTiming {
  double compute_ms = 0;
  double communication_ms = 0;  ///< post to completion of the step's messages
  double exposed_ms = 0;        ///< waited for them
  std::int64_t bytes_sent = 0;
  std::int64_t bytes_received = 0;
  /// When the step's work and its messages' copies ran, milliseconds since the rank posted step 1; NaN for what the step lacks or nobody
  /// timed.
  double work_begin_ms = std::numeric_limits<double>::quiet_NaN();
  double work_end_ms = std::numeric_limits<double>::quiet_NaN();
  double transfer_begin_ms = std::numeric_limits<double>::quiet_NaN();
  double transfer_end_ms = std::numeric_limits<double>::quiet_NaN();
};

}  // namespace annulus
