// SPDX-License-Identifier: Apache-2.0
// The manual page and the completion of bash say what --help says.
#include <annulus_test.hpp>

#include "program.hpp"

#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

const std::vector<std::string> kCommands{"run", "check", "bench", "plan", "info", "generate"};

/// The long flags that begin a line of --help.
std::vector<std::string> flags_of(const std::string& command) {
  std::istringstream help(annulus_with({command, "--help"}).out);
  std::vector<std::string> flags;
  for (std::string line; std::getline(help, line);) {
    const std::size_t begin = line.find_first_not_of(' ');
    if (begin == std::string::npos || begin == 0 || line.compare(begin, 2, "--") != 0) { continue; }
    flags.push_back(line.substr(begin, line.find_first_of(" [", begin) - begin));
  }
  return flags;
}

/// What bash offers for the last of `words`, which may be empty.
std::set<std::string> completions(const std::vector<std::string>& words) {
  std::string line = "source <(\"$A\" --bash-completion) || exit 9; COMP_WORDS=(\"$A\"";
  for (const std::string& word : words) { line += " '" + word + "'"; }
  line += "); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _annulus; printf '%s\\n' \"${COMPREPLY[@]}\"";
  const ProcessResult result = run_bash(line);
  INFO(line << "\n" << result.err);
  REQUIRE(result.exit_code == 0);
  std::set<std::string> found;
  std::istringstream text(result.out);
  for (std::string word; std::getline(text, word);) {
    if (!word.empty()) { found.insert(word); }
  }
  return found;
}

}  // namespace

TEST_CASE("the manual page has every command and every flag, and is roff without a fault") {
  const ProcessResult page = annulus_with({"--man-page"});

  REQUIRE(page.exit_code == 0);
  CHECK(page.err.empty());
  CHECK(page.out.starts_with(".TH ANNULUS 1 "));
  for (const std::string& command : kCommands) {
    CHECK_THAT(page.out, contains_text("\n\\fB" + command + "\\fR\n"));
    const std::vector<std::string> flags = flags_of(command);
    REQUIRE(flags.size() > 3);
    for (const std::string& flag : flags) {
      std::string bold;
      for (const char letter : flag) { bold += letter == '-' ? std::string("\\-") : std::string(1, letter); }
      INFO(command << " " << flag);
      CHECK_THAT(page.out, contains_text("\n\\fB" + bold + "\\fR"));
    }
  }
  const ProcessResult formatted = run_bash("command -v groff >/dev/null || exit 7; \"$A\" --man-page | groff -man -Tutf8 -ww >/dev/null");
  INFO(formatted.err);
  CHECK((formatted.exit_code == 0 || formatted.exit_code == 7));
  CHECK(formatted.err.empty());
}

TEST_CASE("bash completes commands, and after one its flags and no others") {
  std::set<std::string> first = completions({""});

  for (const std::string& command : kCommands) { CHECK(first.erase(command) == 1); }
  CHECK(first == std::set<std::string>{"--bash-completion", "--help", "--man-page", "--version"});
  CHECK(completions({"ch"}) == std::set<std::string>{"check"});
  for (const std::string& command : kCommands) {
    const std::vector<std::string> flags = flags_of(command);
    std::set<std::string> expected(flags.begin(), flags.end());
    expected.insert("--help");
    INFO(command);
    CHECK(completions({command, "--"}) == expected);
  }
}

TEST_CASE("bash completes the values of an option: names, presets and files, and no others") {
  const TemporaryFolder folder;
  std::ofstream(folder / "job.toml") << "";

  CHECK(completions({"run", "--mixing", ""}) == std::set<std::string>{"lse", "mean", "sum"});
  CHECK(completions({"run", "--transport", "l"}) == std::set<std::string>{"loopback"});
  CHECK(completions({"run", "--preset", "hilbert"}) == std::set<std::string>{"hilbert", "hilbert-permuted"});
  CHECK(completions({"run", "--config", folder / "j"}) == std::set<std::string>{folder / "job.toml"});
  CHECK(completions({"run", "--output", folder / "j"}) == std::set<std::string>{folder / "job.toml"});
  CHECK(completions({"run", "--seq-len", ""}).empty());
  CHECK(completions({"run", "--causal", "--hea"}) == std::set<std::string>{"--head-dim", "--head-split", "--heads"});
}
