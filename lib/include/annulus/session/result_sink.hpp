// SPDX-License-Identifier: Apache-2.0
// From the ranks' outputs to what users get: the result file and the counts of its rows.
#pragma once

#include <annulus/io/result_file.hpp>
#include <annulus/session/session.hpp>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

/// The result file of a configuration, on rank 0; null on the others, and where there is no output. Made before the input is read: whatever
/// keeps the file from being written is known then. Collective.
/// @throws AgreedError as ResultFile
std::unique_ptr<ResultFile> create_result(const ResolvedConfig& resolved, const Communicator& comm);

/// Looks through O, LSE and y of the last run. The same on all ranks. Collective.
RowCounts count_rows(const Session& session);

/// Streams the session's rows of O, or y where there is a layer, and LSE of all ranks into `file` through rank 0, which then calls `then`.
/// Collective. @param file  on rank 0, null on the others @throws AgreedError if the disk refuses, or `then` throws
void write_rows(const Session& session, ResultFile* file, const std::function<void()>& then);

/// Streams O, or y where there is a layer, and LSE of all ranks into `file` through rank 0, with everything else that a result has (of the
/// timings /timings/* [rank, step], the numbers of StepTiming), and commits it. Collective; complete or absent. @param file as
/// create_result() made it @param timings as gather_timings() @throws AgreedError if the disk refuses
void write_result(const Session& session, ResultFile* file, const std::vector<std::vector<StepTiming>>& timings, const RowCounts& counts,
                  const std::vector<std::pair<std::string, std::string>>& provenance);

}  // namespace annulus
