// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/job/stop_request.hpp>
#include <annulus/session/session.hpp>
#include <annulus/verify/compare.hpp>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace annulus {

/// One checked problem.
struct CaseReport {
  std::string name;   ///< "configured problem" or the case's number and description
  std::string flags;  ///< what reproduces it
  ErrorSums sums;
  Verdict verdict;
  std::int64_t rows_checked = 0;
  std::int64_t rows_total = 0;
};

/// Compares the last run of a session with the oracle: `rows` sampled rows, or all of them if rows is 0 and the problem small (else 256).
/// Every rank checks the rows it owns; all get the same report. Collective.
CaseReport check_session(Session& session, std::int64_t rows);

/// `annulus check`: the configured problem, or config.cases random ones (drawn from config.seed; ranks from the job or, alone, virtual).
/// Calls `report` for each case on every rank, and asks `stop` before each. Returns whether all of them passed; how many there were only
/// `report` knows, if the job was to stop. Collective.
bool check(const Config& config, const Communicator& comm, StopRequest& stop, const std::function<void(const CaseReport&)>& report);

}  // namespace annulus
