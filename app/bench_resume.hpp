// SPDX-License-Identifier: Apache-2.0
// `bench --resume`: rows that an earlier job has measured of the same table.
#pragma once

#include <annulus/bench/bench_file.hpp>

#include "commands.hpp"

#include <cstdint>
#include <optional>

namespace annulus::app {

/// What the --output of an earlier job holds; nothing without --resume, and where there is no such file yet.
/// @param processes  of this job
/// @throws InvalidArgument if it cannot be read, or is of another table, version or number of ranks: rows of one table are measured alike
std::optional<BenchContents> earlier_rows(const Invocation& invocation, std::int64_t processes);

}  // namespace annulus::app
