// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>
#include <annulus/core/text.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/io/examine_input.hpp>
#include <annulus/io/file_identity.hpp>
#include <annulus/io/result_file.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/job/stop_request.hpp>
#include <annulus/session/session.hpp>
#include <annulus/transport/gpu_transports.hpp>

#include "commands.hpp"
#include "config_file.hpp"
#include "launcher.hpp"
#include "manual.hpp"
#include "options.hpp"
#include "same_job.hpp"
#include "signals.hpp"
#include "standard_output.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace annulus;
using namespace annulus::app;

/// One subcommand of the command line and what was typed for it.
struct Subcommand {
  Command command = Command::run;
  CLI::App* parser = nullptr;
  std::map<std::string_view, std::string> typed;  ///< by option name
  std::string preset;
  std::string file;
  std::optional<std::string> file_text;  ///< of `file`, once it is read
  bool print_config = false;
  bool json = false;
};

void add_options(Subcommand& sub) {
  for (const Option& option : options()) {
    if (!option.is_of(sub.command)) { continue; }
    CLI::Option* flag = sub.parser->add_option("--" + std::string(option.name), sub.typed[option.name], option.help)
                            ->group(std::string(to_string(option.scope)))
                            ->type_name(std::string(value_name_of(option)));
    if (option.kind == ValueKind::boolean) { flag->expected(0, 1)->default_str("true"); }
    if (option.kind == ValueKind::texts) { flag->multi_option_policy(CLI::MultiOptionPolicy::Join); }
  }
  const auto add_common = [&](const CommonFlag& common, auto& variable) {
    const std::string name = "--" + std::string(common.name);
    const std::string help(common.help);
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(variable)>, bool>) {
      sub.parser->add_flag(name, variable, help)->group("Configuration");
    } else {
      sub.parser->add_option(name, variable, help)->type_name(std::string(common.value_name))->group("Configuration");
    }
  };
  add_common(kPresetFlag, sub.preset);
  add_common(kConfigFlag, sub.file);
  add_common(kPrintConfigFlag, sub.print_config);
  add_common(kJsonFlag, sub.json);
}

/// Applies --config, which is read. What it says of other commands is not used, which may be meant (one file for run and plan) and is said.
void apply_file(Draft& draft, const Subcommand& sub) {
  draft.config.config_file = sub.file;
  auto given = std::exchange(draft.config.given, {});
  apply_config(draft, *sub.file_text, sub.file);
  std::vector<std::string> unused;
  for (const std::string& name : draft.config.given) {
    if (!find_option(name)->is_of(sub.command)) { unused.push_back(name); }
  }
  draft.config.given.merge(given);
  if (unused.empty() || launched_rank() != 0) { return; }
  print_error(fmt::format("{}: {} does not use {}", sub.file, to_string(sub.command), fmt::join(unused, ", ")));
}

/// Preset < file < flags.
Draft gather_options(const Subcommand& sub) {
  Draft draft;
  if (!sub.preset.empty()) {
    draft.config.preset_file = preset_path(sub.preset);
    apply_config(draft, read_config(draft.config.preset_file), draft.config.preset_file);
  }
  if (sub.file_text) { apply_file(draft, sub); }
  for (const Option& option : options()) {
    const auto typed = sub.typed.find(option.name);
    if (typed == sub.typed.end() || sub.parser->count("--" + std::string(option.name)) == 0) { continue; }
    apply(draft, option, parse_value(option, typed->second.empty() && option.kind == ValueKind::boolean ? "true" : typed->second));
  }
  return draft;
}

/// Prints all that was asked for.
int print_and_pass(const std::string& text) {
  print_text(text);
  finish_output();
  return static_cast<int>(ExitCode::passed);
}

int report(const Error& error) {
  flush_output();  // what was found before it failed
  print_error(error.what());
  return static_cast<int>(error.code());
}

/// Set when main() returns: whatever ends the process before that is not this program.
bool left_by_main = false;

/// A library that ends the process by itself, as OpenMP's does when it gets no threads, takes an exit code that means something else here.
void end_as_failure() {
  if (left_by_main) { return; }
  remove_unfinished_results();
  flush_output();
  print_error("a library has ended the process; it may have said why above");
  std::_Exit(static_cast<int>(ExitCode::runtime_failure));
}

/// The text of the configuration file `path` on a rank that cannot read it itself; `piped` is what rank 0 read from a pipe, after the
/// pipe's name and a NUL.
std::string piped_config(const std::string& path, const std::string& piped) {
  if (piped.size() > path.size() && piped.compare(0, path.size(), path) == 0 && piped[path.size()] == '\0') {
    return piped.substr(path.size() + 1);
  }
  ANNULUS_EXPECTS(!is_pipe(path), "configuration file '{}' is a pipe, which can be read once; rank 0 would, and does not", path);
  return read_config(path);
}

/// What the chosen subcommand is to do.
/// @throws InvalidArgument for what files and flags say wrong
Invocation invocation_of(const Subcommand& chosen, int argc, char** argv) {
  Invocation invocation;
  invocation.command = chosen.command;
  invocation.json = chosen.json;
  for (int i = 0; i < argc; ++i) {
    ANNULUS_EXPECTS(is_utf8(argv[i]), "argument '{}' is not UTF-8", printable(argv[i]));
    invocation.command_line += fmt::format("{}{}", i == 0 ? "" : " ", argv[i]);
  }
  Draft draft = gather_options(chosen);
  if (chosen.command == Command::bench) {
    invocation.rows = bench_rows(draft);
    invocation.config = invocation.rows.front().config;
    invocation.config.sweep = draft.config.sweep;
  } else {
    invocation.config = complete(std::move(draft));
  }
  require_distinct_files(named_files(invocation.config));
  return invocation;
}

int run_main(int argc, char** argv) {
  StopRequest stop;  // first of all: the time of the job counts from here
  CLI::App parser{std::string(program_help())};
  parser.name("annulus");
  parser.footer(std::string(exit_codes_help()));
  parser.set_version_flag("--version", std::string(build_info().version));
  std::string manual;
  const auto print_manual = [&](const std::string& name, const std::string& help, std::string (*text)()) {
    parser.add_flag_callback(
        name,
        [&manual, text] {
          manual = text();
          throw CLI::Success();
        },
        help);
  };
  print_manual("--man-page", "print the manual page of all commands and options, for man -l, and exit", man_page);
  print_manual("--bash-completion",
               "print what completes commands, options and values in bash (source <(annulus --bash-completion)), and exit",
               bash_completion);
  parser.require_subcommand(1);
  std::array<Subcommand, EnumNames<Command>::values.size()> subcommands;
  for (std::size_t i = 0; i < subcommands.size(); ++i) {
    subcommands[i].command = EnumNames<Command>::values[i].first;
    subcommands[i].parser =
        parser.add_subcommand(std::string(to_string(subcommands[i].command)), std::string(help_of(subcommands[i].command)));
    add_options(subcommands[i]);
  }
  const bool speaks = launched_rank() == 0;
  Subcommand* chosen = nullptr;
  Invocation invocation;
  std::exception_ptr failure;
  bool serial = false;
  bool waits = false;
  try {
    parser.parse(argc, argv);
    chosen = &*std::find_if(subcommands.begin(), subcommands.end(), [](const Subcommand& sub) { return sub.parser->parsed(); });
    // Work of one process that needs no MPI. The other ranks of a launcher leave without a word, and with success: a launcher that sees a
    // failure ends rank 0, which may not have spoken yet.
    const bool lists = chosen->preset == "list";
    serial = chosen->command == Command::plan || chosen->print_config || lists;
    if (serial && !speaks) { return static_cast<int>(ExitCode::passed); }
    if (lists) { return print_and_pass(preset_list()); }
    // A pipe can be read once, by rank 0, which sends the others what it read.
    waits = !serial && under_launcher() && !speaks && !chosen->file.empty() && !is_regular_file(chosen->file);
    if (!chosen->file.empty() && !waits) { chosen->file_text = read_config(chosen->file); }
    if (!waits) { invocation = invocation_of(*chosen, argc, argv); }
    // Before MPI starts, and before any rank opens it: the others of the host wait in MPI for the verdict.
    const bool reads = !invocation.config.input.empty() && !chosen->print_config && invocation.config.cases == 0;
    if (reads && first_on_host()) {
      const Config& config = invocation.config;
      if (config.layer) {
        examine_layer_input(config.input, config.given.contains("heads") ? std::optional(config.problem.heads) : std::nullopt);
      } else {
        examine_input(config.input, config.gradients ? InputUse::gradients : InputUse::forward);
      }
    }
  } catch (const CLI::Success& wanted) {
    std::ostringstream text;  // of --help and --version; others print nothing here
    parser.exit(wanted, text, text);
    return print_and_pass(speaks ? text.str() + manual : std::string());
  } catch (const CLI::ParseError& error) {
    const std::vector<std::string> unknown = parser.remaining(true);
    std::string message = unknown.empty() ? error.what() : fmt::format("unknown argument {}; --help lists what there is", unknown.front());
    std::replace(message.begin(), message.end(), '\n', ' ');
    failure = std::make_exception_ptr(InvalidArgument(message));
  } catch (const Error&) { failure = std::current_exception(); }

  if (failure && (serial || !under_launcher())) { std::rethrow_exception(failure); }
  if (chosen != nullptr && chosen->print_config) { return print_and_pass(to_toml(invocation.config, invocation.command)); }

  if (chosen != nullptr && can_stop(chosen->command)) { stop.heed_signals(); }
  tidy_up_on_signals();
  prepare_gpu_connections();
  if (invocation.config.share_gpu) { prepare_gpu_sharing(); }
  std::optional<MpiEnvironment> mpi;
  if (!serial && under_launcher()) {
    mpi.emplace(&argc, &argv, invocation.config.timeout_s, [siblings = Siblings()]() mutable { return siblings.missing(); });
    try {
      mpi->require_one_version(invocation.config.timeout_s);
    } catch (const AgreedError& error) {
      // All ranks know, and none goes on.
      return error.reporter() ? report(error) : static_cast<int>(error.code());
    }
    const bool read_pipe = speaks && chosen != nullptr && chosen->file_text && !is_regular_file(chosen->file);
    const std::string piped = mpi->from_rank_0(read_pipe ? chosen->file + '\0' + *chosen->file_text : std::string());
    try {
      if (waits) {
        chosen->file_text = piped_config(chosen->file, piped);
        invocation = invocation_of(*chosen, argc, argv);
      }
    } catch (const Error&) { failure = std::current_exception(); }
  }
  stop.set_limit(invocation.config.max_time_s);
  const Communicator comm = mpi ? Communicator::world(invocation.config.timeout_s) : Communicator::single();
  const bool lost_peers = comm.size() == 1 && slurm_tasks() > 1 && std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr;
  if (lost_peers && !serial) {
    throw InvalidArgument(fmt::format(
        "this Slurm step has {} tasks but each is a world of its own: start it with srun --mpi=pmix, or with mpirun", slurm_tasks()));
  }
  try {
    ExitCode code = ExitCode::passed;
    // Whatever one rank alone knows of ends the job, whether it is an error of ours or of the standard library.
    fail_fast(comm, [&] {
      try {
        comm.agree(failure);
        require_same_invocation(invocation, comm);
        code = execute(invocation, comm, stop);
        together(comm, finish_output);
      } catch (const AgreedError&) { throw; } catch (...) {
        flush_output();  // what was reported until then
        throw;
      }
    });
    return static_cast<int>(code);
  } catch (const AgreedError& error) {
    // Every rank is here with the same code; one prints.
    return error.reporter() ? report(Error(error.code(), comm.size() > 1 ? comm.name() + ": " + error.what() : error.what()))
                            : static_cast<int>(error.code());
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::atexit(end_as_failure);
  hold_standard_descriptors();
  int code = static_cast<int>(ExitCode::runtime_failure);
  try {
    // Standard output is the result's.
    spdlog::set_default_logger(spdlog::stderr_color_mt("annulus"));
    code = run_main(argc, argv);
  } catch (const annulus::Error& error) { code = report(error); } catch (const std::exception& error) {
    print_error(error.what());
  }
  left_by_main = true;
  return code;
}
