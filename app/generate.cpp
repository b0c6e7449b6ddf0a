// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/thread_stacks.hpp>
#include <annulus/io/source.hpp>
#include <annulus/session/session.hpp>

#include "commands.hpp"
#include "report.hpp"
#include "standard_output.hpp"

#include <algorithm>
#include <cstdint>

namespace annulus::app {

ExitCode execute_generate(const Invocation& invocation) {
  const Config config = resolve_without_job(invocation.config).config;
  ANNULUS_EXPECTS(!config.output.empty(), "generate needs --output, the file to write");
  const std::int64_t threads = config.threads > 0 ? config.threads : default_threads(Communicator::single());
  require_thread_stacks(checked_narrow<int>(threads));
  write_generated_input(config.output, config.force, config.problem, config.seed, checked_narrow<int>(threads));
  say("wrote {}: {}, seed {}\n", config.output, describe(config.problem), config.seed);
  return ExitCode::passed;
}

}  // namespace annulus::app
