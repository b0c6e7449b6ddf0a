// SPDX-License-Identifier: Apache-2.0
#include "bench_resume.hpp"

#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>

#include "config_file.hpp"

#include <algorithm>
#include <array>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

namespace annulus::app {

namespace {

/// Options of a job that say nothing of its rows.
constexpr std::array<std::string_view, 6> kOfJob{"output", "csv", "force", "resume", "max-time", "timeout"};

/// The configuration of the rows, as the file that they are in keeps it.
Config configuration_in(const std::string& text, const std::string& what) {
  Draft draft;
  apply_config(draft, text, what);
  Config config = bench_rows(draft).front().config;
  config.sweep = draft.config.sweep;
  return config;
}

/// What the two say of an option; empty if it is left to the input or to its default.
std::string option_text(const Option& option, const Config& config) {
  Value value;
  return option.get(config, value) ? text_of(value) : std::string();
}

void require_same_table(const Config& earlier, const Config& present, const std::string& what) {
  for (const Option& option : options()) {
    if (!option.is_of(Command::bench) || std::ranges::find(kOfJob, option.name) != kOfJob.end()) { continue; }
    const std::string before = option_text(option, earlier);
    const std::string now = option_text(option, present);
    ANNULUS_EXPECTS(before == now,
                    "--resume: the rows in {} have {} '{}' and this job '{}'; name another --output, or begin anew by --force", what,
                    option.name, before, now);
  }
}

}  // namespace

std::optional<BenchContents> earlier_rows(const Invocation& invocation, std::int64_t processes) {
  const Config& config = invocation.config;
  if (!config.resume || !std::filesystem::exists(config.output)) { return std::nullopt; }
  const std::string what = fmt::format("'{}'", config.output);
  BenchContents contents = read_bench_file(config.output);
  const auto text = [&](std::string_view name) {
    const std::string* const found = contents.text(name);
    return found == nullptr ? std::string() : *found;
  };
  const BuildInfo& build = build_info();
  const std::string program = fmt::format("{} ({})", build.version, build.git);
  const std::string earlier_program = fmt::format("{} ({})", text("version"), text("git"));
  ANNULUS_EXPECTS(program == earlier_program, "--resume: the rows in {} are annulus {}'s, and this is {}", what, earlier_program, program);
  require_same_table(configuration_in(text("config"), config.output), config, what);
  const NamedColumn* const ranks = contents.column("ranks");
  const auto* const numbers = ranks == nullptr ? nullptr : std::get_if<std::vector<std::int64_t>>(&ranks->values);
  ANNULUS_EXPECTS(numbers != nullptr && !numbers->empty() && std::cmp_less_equal(numbers->size(), invocation.rows.size()),
                  "--resume: {} is not the table of this sweep", what);
  const std::int64_t present = processes > 1 ? processes : invocation.rows.front().config.virtual_ranks;
  ANNULUS_EXPECTS(numbers->front() == present, "--resume: the rows in {} were measured on {} ranks, and this job has {}", what,
                  numbers->front(), present);
  return contents;
}

}  // namespace annulus::app
