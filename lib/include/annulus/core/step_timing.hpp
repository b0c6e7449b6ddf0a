// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/named_column.hpp>

#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

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

/// A number of a StepTiming, by the name that files and reports give it.
struct StepNumber {
  std::string_view name;
  std::variant<std::int64_t StepTiming::*, double StepTiming::*> field;
};

/// All of them, in the order of files and reports.
inline constexpr std::array<StepNumber, 9> kStepNumbers{{
    {"compute_ms", &StepTiming::compute_ms},
    {"communication_ms", &StepTiming::communication_ms},
    {"exposed_ms", &StepTiming::exposed_ms},
    {"bytes_sent", &StepTiming::bytes_sent},
    {"bytes_received", &StepTiming::bytes_received},
    {"work_begin_ms", &StepTiming::work_begin_ms},
    {"work_end_ms", &StepTiming::work_end_ms},
    {"transfer_begin_ms", &StepTiming::transfer_begin_ms},
    {"transfer_end_ms", &StepTiming::transfer_end_ms},
}};

/// The same as columns [rank, step]. A rank with fewer steps than others has what a StepTiming starts with for those that it lacks.
struct StepColumns {
  std::int64_t ranks = 0;
  std::int64_t steps = 0;
  std::vector<NamedColumn> columns;
};

/// @param timings [rank][step]
StepColumns step_columns(std::span<const std::vector<StepTiming>> timings);

}  // namespace annulus
