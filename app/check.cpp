// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/check.hpp>

#include "commands.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "standard_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace annulus::app {

ExitCode execute_check(const Invocation& invocation, const Communicator& comm, StopRequest& stop) {
  const Progress progress(comm.rank() == 0 && !invocation.json);
  Json cases = Json::array();
  std::int64_t done = 0;
  std::int64_t failed = 0;
  const bool many = invocation.config.cases > 0;
  const std::int64_t wanted = std::max<std::int64_t>(1, invocation.config.cases);
  const bool passed = check(invocation.config, comm, stop, [&](const CaseReport& report) {
    ++done;
    failed += report.verdict.passed ? 0 : 1;
    if (comm.rank() != 0) { return; }
    progress.show("");
    if (invocation.json) {
      cases.push_back(to_json(report));
    } else {
      say("{}\n", line_of(report));
      if (many) { progress.show(fmt::format("{} of {} cases", done, wanted)); }
    }
  });
  progress.show("");
  if (comm.rank() == 0) {
    if (invocation.json) {
      Json json{{"passed", passed}, {"cases", std::move(cases)}};
      if (done < wanted) { json["stopped"] = stopped_line(stop, done, wanted, "case"); }
      say("{}\n", json.dump(2));
    } else if (many) {
      say("{} cases, {} failed (seed {})\n", done, failed, invocation.config.seed);
    }
    if (done < wanted) { print_error(stopped_line(stop, done, wanted, "case")); }
  }
  if (!passed) { return ExitCode::check_failed; }
  return done < wanted ? ExitCode::stopped : ExitCode::passed;
}

}  // namespace annulus::app
