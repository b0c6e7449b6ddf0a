// SPDX-License-Identifier: Apache-2.0
// How problems, checks and timings are told, in words and in JSON.
#pragma once

#include <annulus/core/step_timing.hpp>
#include <annulus/io/result_file.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/job/stop_request.hpp>
#include <annulus/pattern/progression.hpp>
#include <annulus/session/check.hpp>

#include "commands.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace annulus::app {

using Json = nlohmann::ordered_json;

/// "1.50 GiB".
std::string human_bytes(std::int64_t bytes);

std::string describe(const Problem& problem);
std::string describe(const Pattern& pattern);
/// "layer: embed 576, ...": what is not by default.
std::string describe(const Layer& layer);
/// PASS or FAIL and the errors, one line; of a failure also reason and flags.
std::string line_of(const CaseReport& report);
/// Partition and schedule of a resolved configuration, and why.
std::string ways_text(const Config& config);
/// How many rows are not finite and which is the first; of a result that has some.
std::string line_of(const RowCounts& counts);
/// What share of the softmax keys of zeros took. @param counts  with such shares
std::string zero_keys_line(const RowCounts& counts);

/// "stopped by SIGTERM after 3 of 6 rows". @param what  one of the things that were counted: "row"
std::string stopped_line(const StopRequest& stop, std::int64_t done, std::int64_t wanted, std::string_view what);

/// A count as a JSON number: exact below 2^63, beyond it the nearest double.
Json count_in_json(Int128 count);

Json to_json(const Problem& problem);
Json to_json(const Layer& layer);
Json to_json(const CaseReport& report);
/// [rank][step].
Json to_json(const std::vector<std::vector<StepTiming>>& timings);

/// A line for every process: rank, host and what `backend` runs on there. Collective.
std::string host_lines(const Communicator& comm, std::string_view backend);

/// What every result file says of the program and the command: configuration, command line, versions, environment.
std::vector<std::pair<std::string, std::string>> provenance(const Invocation& invocation, const Config& config);

}  // namespace annulus::app
