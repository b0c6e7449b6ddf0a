// SPDX-License-Identifier: Apache-2.0
// One table of options serves flags, configuration files and --print-config: same names, same ranges, same refusals.
#pragma once

#include <annulus/core/config.hpp>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace annulus::app {

enum class Command { run, check, bench, plan, info, generate };

/// What an option is about: its heading in --help.
enum class Scope { problem, pattern, layer, execution, job, files, check, bench, plan };

/// Whether options of this scope may differ from row to row of a bench, and are told of each.
constexpr bool is_of_row(Scope scope) { return scope == Scope::problem || scope == Scope::pattern || scope == Scope::execution; }

}  // namespace annulus::app

namespace annulus {

template <>
struct EnumNames<app::Command> {
  static constexpr std::array<std::pair<app::Command, std::string_view>, 6> values{{{app::Command::run, "run"},
                                                                                    {app::Command::check, "check"},
                                                                                    {app::Command::bench, "bench"},
                                                                                    {app::Command::plan, "plan"},
                                                                                    {app::Command::info, "info"},
                                                                                    {app::Command::generate, "generate"}}};
};

template <>
struct EnumNames<app::Scope> {
  static constexpr std::array<std::pair<app::Scope, std::string_view>, 9> values{{{app::Scope::problem, "Problem"},
                                                                                  {app::Scope::pattern, "Pattern"},
                                                                                  {app::Scope::layer, "Layer"},
                                                                                  {app::Scope::execution, "Execution"},
                                                                                  {app::Scope::job, "Job"},
                                                                                  {app::Scope::files, "Files"},
                                                                                  {app::Scope::check, "Check"},
                                                                                  {app::Scope::bench, "Bench"},
                                                                                  {app::Scope::plan, "Plan"}}};
};

}  // namespace annulus

namespace annulus::app {

/// A value as flags and files give it.
using Value = std::variant<std::int64_t, double, bool, std::string, std::vector<std::int64_t>, std::vector<std::string>>;

/// A configuration while it is being put together.
struct Draft {
  Config config;
  std::vector<std::int64_t> segment_lengths;
  std::vector<std::int64_t> dilation_rates;
};

enum class ValueKind {
  integer,
  real,
  boolean,
  text,
  integers,
  counts,  ///< integers, of which "..." may stand for a series: 1,2,4,...,64; in a file one or a list
  texts,
};

struct Option {
  std::string_view name;  ///< flag without dashes, and TOML key; of a key in a table, after its name and a point: "layer.embed"
  Scope scope = Scope::problem;
  std::string help;
  ValueKind kind = ValueKind::text;
  std::vector<Command> commands;  ///< whose flags it is among
  std::function<void(Draft&, const Value&)> set;
  std::function<bool(const Config&, Value&)> get;  ///< false: unset, not printed
  std::vector<std::string_view> choices = {};      ///< all values there are; empty where there is no such list
  bool names_file = false;

  bool is_of(Command command) const;
};

/// A flag of every command that is no option, since it says where options come from or what is printed.
struct CommonFlag {
  std::string_view name;
  std::string_view value_name;  ///< empty: it takes no value
  std::string_view help;
};
constexpr CommonFlag kPresetFlag{"preset", "NAME", "named configuration, below --config and flags; list: what there is"};
constexpr CommonFlag kConfigFlag{"config", "FILE", "TOML file of options, below flags"};
constexpr CommonFlag kPrintConfigFlag{"print-config", "", "print the configuration as TOML and stop"};
constexpr CommonFlag kJsonFlag{"json", "", "print the result as JSON"};
constexpr std::array<CommonFlag, 4> kCommonFlags{kPresetFlag, kConfigFlag, kPrintConfigFlag, kJsonFlag};

/// What the program is, what a command does, what its exit codes are and what a value of an option is called, in --help and elsewhere.
std::string_view program_help();
std::string_view help_of(Command command);
std::string_view exit_codes_help();
std::string_view value_name_of(const Option& option);

/// All options, in the order of --help and --print-config.
const std::vector<Option>& options();

/// The option named `name`, or null.
const Option* find_option(std::string_view name);

/// `text` as a value of the option: decimal integers in range, finite numbers, lists without holes. Texts are one a line.
/// @throws InvalidArgument naming option and text
Value parse_value(const Option& option, std::string_view text);

/// A value as a flag spells it: parse_value() reads it back.
std::string text_of(const Value& value);

/// Sets the option and notes that it was given.
void apply(Draft& draft, const Option& option, const Value& value);

/// Joins the lists into branches and fills in kv-heads. @throws InvalidArgument if they do not fit together
Config complete(Draft draft);

}  // namespace annulus::app
