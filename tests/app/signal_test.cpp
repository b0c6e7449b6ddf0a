// SPDX-License-Identifier: Apache-2.0
#include <signal.h>

#include <annulus_test.hpp>

#include "program.hpp"

#include <cerrno>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

/// Environments in which an unfinished result has no name, if the disk can, and has one.
const std::vector<std::vector<std::string>> kUnfinished{
    {}, {"LD_PRELOAD=" ANNULUS_FAILING_CALLS, "FAIL_TMPFILE=" + std::to_string(EOPNOTSUPP)}};

/// A run of several seconds that has begun its result, which `signal` meets.
ProcessResult interrupted_run(const TemporaryFolder& folder, int signal, const std::vector<std::string>& environment) {
  bool sent = false;
  const ProcessResult result =
      annulus_with({"run", "--seq-len", "20000", "--heads", "8", "--head-dim", "128", "--threads", "1", "--output", folder / "out.h5"},
                   environment, 60, [&](pid_t pid) {
                     if (sent || !has_open_file_below(pid, folder / "")) { return; }
                     kill(pid, signal);
                     sent = true;
                   });
  CHECK(sent);
  return result;
}

}  // namespace

TEST_CASE("a run that a signal ends leaves no file, and ends by that signal") {
  for (const int signal : {SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGALRM, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGVTALRM, SIGPROF, SIGRTMIN}) {
    for (const std::vector<std::string>& environment : kUnfinished) {
      const TemporaryFolder folder;
      const ProcessResult result = interrupted_run(folder, signal, environment);
      INFO(signal << (environment.empty() ? " " : ", with a name, ") << result.err);
      CHECK(result.exit_code == 128 + signal);
      CHECK(sorted_names(folder).empty());
    }
  }
}

TEST_CASE("a signal that the parent had set to be ignored stays ignored") {
  const TemporaryFolder folder;
  const std::string path = folder / "out.h5";
  for (const char* signal : {"HUP", "TERM", "USR1", "QUIT"}) {
    const std::string name(signal);
    // Several times while it runs, whatever it does just then.
    const ProcessResult result =
        run_bash("trap '' " + name + "; (exec \"$A\" run --seq-len 64 --heads 2 --force --output '" + path +
                 "') & for i in 1 2 3 4 5 6 7 8 9 10; do kill -" + name + " $! 2>/dev/null; sleep 0.02; done; wait $!");
    INFO(signal << " " << result.err);
    CHECK(result.exit_code == 0);
    CHECK(sorted_names(folder) == std::vector<std::string>{"out.h5"});
  }
}

TEST_CASE("a limit on processor time ends a run without a trace") {
  for (const std::vector<std::string>& environment : kUnfinished) {
    const TemporaryFolder folder;
    const ProcessResult result = run_bash(
        "ulimit -S -t 1; exec \"$A\" run --seq-len 200000 --heads 1 --threads 1 --output '" + (folder / "out.h5") + "'", environment);
    INFO(result.err);
    CHECK(result.exit_code == 128 + SIGXCPU);
    CHECK(sorted_names(folder).empty());
  }
}
