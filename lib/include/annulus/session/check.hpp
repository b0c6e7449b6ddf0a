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

/// The gradient of one of the inputs.
struct GradientReport {
  Tensor tensor = Tensor::q;
  ErrorSums sums;
  Verdict verdict;
};

/// One checked problem.
struct CaseReport {
  std::string name;   ///< "configured problem" or the case's number and description
  std::string flags;  ///< what reproduces it
  ErrorSums sums;
  Verdict verdict;  ///< of O and LSE; passed only if all gradients are right too, with the reason of the first that is not
  std::vector<GradientReport> gradients;  ///< of Q, K and V, or none
  std::int64_t gradient_kv_heads = 0;     ///< that they were compared of
  std::int64_t rows_checked = 0;
  std::int64_t rows_total = 0;
};

/// Compares the last run of a session with the oracle: `rows` sampled rows, or all of them if rows is 0 and the problem small (else 256).
/// With gradients, those of the same rows are compared; of a large problem, for one KV head and its query heads: the exact dK of a row
/// needs the softmax of every query that sees it. Every rank checks the rows it owns; all get the same report. Collective.
CaseReport check_session(Session& session, std::int64_t rows);

/// `annulus check`: the configured problem, or config.cases random ones (drawn from config.seed; ranks from the job or, alone, virtual).
/// Calls `report` for each case on every rank, and asks `stop` before each. Returns whether all of them passed; how many there were only
/// `report` knows, if the job was to stop. Collective.
bool check(const Config& config, const Communicator& comm, StopRequest& stop, const std::function<void(const CaseReport&)>& report);

}  // namespace annulus
