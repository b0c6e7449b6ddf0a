// SPDX-License-Identifier: Apache-2.0
#include "manual.hpp"

#include <annulus/core/build_info.hpp>

#include "options.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace annulus::app {

namespace {

/// Text as roff takes it: a minus that can be copied, and no line that is read as a request.
std::string roff(std::string_view text) {
  std::string escaped;
  for (const char letter : text) {
    switch (letter) {
      case '-':
        escaped += "\\-";
        break;
      case '\\':
        escaped += "\\e";
        break;
      case '\n':
        escaped += ' ';
        break;
      default:
        escaped += letter;
    }
  }
  return escaped.starts_with('.') || escaped.starts_with('\'') ? "\\&" + escaped : escaped;
}

std::string paragraph(std::string_view name, std::string_view value_name, std::string_view text) {
  const std::string value = value_name.empty() ? std::string() : fmt::format(" \\fI{}\\fR", roff(value_name));
  return fmt::format(".TP\n\\fB{}\\fR{}\n{}\n", roff(name), value, roff(text));
}

/// "run, check": whose flags an option is among.
std::string commands_text(const Option& option) {
  std::string text;
  for (const auto& [command, name] : EnumNames<Command>::values) {
    if (option.is_of(command)) { text += fmt::format("{}{}", text.empty() ? "" : ", ", name); }
  }
  return text;
}

std::string names_of_flags(Command command) {
  std::string names = "--help";
  for (const Option& option : options()) {
    if (option.is_of(command)) { names += fmt::format(" --{}", option.name); }
  }
  for (const CommonFlag& flag : kCommonFlags) { names += fmt::format(" --{}", flag.name); }
  return names;
}

}  // namespace

std::string man_page() {
  std::string page = fmt::format(".TH ANNULUS 1 \"\" \"annulus {}\" \"User Commands\"\n", build_info().version);
  page += fmt::format(".SH NAME\nannulus \\- {}\n", roff(program_help()));
  page += ".SH SYNOPSIS\n.B annulus\n.I command\n.RI [ options ]\n";
  page +=
      ".SH DESCRIPTION\nEvery MPI rank owns one shard of the sequence; blocks of keys and values travel around a ring of ranks while the "
      "resident block is attended. Start it with mpirun or srun, or by itself as one rank. Options are spelled like the keys of the TOML "
      "file of \\fB\\-\\-config\\fR; what is in a preset is below the file, and the file below flags.\n";
  page += ".SH COMMANDS\n";
  for (const auto& [command, name] : EnumNames<Command>::values) { page += paragraph(name, "", help_of(command)); }
  page += ".SH OPTIONS\n";
  for (const auto& [scope, heading] : EnumNames<Scope>::values) {
    page += fmt::format(".SS {}\n", heading);
    for (const Option& option : options()) {
      if (option.scope != scope) { continue; }
      page +=
          paragraph(fmt::format("--{}", option.name), value_name_of(option), fmt::format("{} [{}]", option.help, commands_text(option)));
    }
  }
  page += ".SS Configuration\n";
  for (const CommonFlag& flag : kCommonFlags) { page += paragraph(fmt::format("--{}", flag.name), flag.value_name, flag.help); }
  page += fmt::format(".SH EXIT STATUS\n{}\n", roff(exit_codes_help()));
  page += ".SH SEE ALSO\n.BR mpirun (1),\n.BR srun (1)\n";
  return page;
}

std::string bash_completion() {
  std::string commands;
  for (const auto& entry : EnumNames<Command>::values) { commands += fmt::format("{}{}", commands.empty() ? "" : " ", entry.second); }
  std::string alternatives = commands;
  std::replace(alternatives.begin(), alternatives.end(), ' ', '|');

  std::string text = "# bash completion of annulus: source <(annulus --bash-completion)\n";
  text += "_annulus() {\n  local word command= current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} names=\n";
  text += "  COMPREPLY=()\n";
  text += fmt::format(
      "  for word in \"${{COMP_WORDS[@]:1:COMP_CWORD-1}}\"; do\n    case $word in\n      {}) command=$word && break ;;\n    esac\n  done\n",
      alternatives);
  text += "  case $previous in\n";
  std::string files = fmt::format("--{}", kConfigFlag.name);
  for (const Option& option : options()) {
    if (option.names_file) {
      files += fmt::format(" | --{}", option.name);
    } else if (!option.choices.empty()) {
      text += fmt::format("    --{}) names=\"{}\" ;;\n", option.name, fmt::join(option.choices, " "));
    } else if (option.kind != ValueKind::boolean) {
      text += fmt::format("    --{}) return ;;\n", option.name);
    }
  }
  text += fmt::format("    {})\n      mapfile -t COMPREPLY < <(compgen -f -- \"$current\")\n      return\n      ;;\n", files);
  // What there is depends on the installation.
  text += fmt::format("    --{}) names=$(\"${{COMP_WORDS[0]}}\" run --preset list 2>/dev/null | cut -d ' ' -f 1) ;;\n", kPresetFlag.name);
  text += "  esac\n  if [[ -z $names ]]; then\n    case $command in\n";
  for (const auto& [command, name] : EnumNames<Command>::values) {
    text += fmt::format("      {}) names=\"{}\" ;;\n", name, names_of_flags(command));
  }
  text += fmt::format("      *) names=\"{} --help --version --man-page --bash-completion\" ;;\n    esac\n  fi\n", commands);
  text += "  mapfile -t COMPREPLY < <(compgen -W \"$names\" -- \"$current\")\n}\ncomplete -o filenames -F _annulus annulus\n";
  return text;
}

}  // namespace annulus::app
