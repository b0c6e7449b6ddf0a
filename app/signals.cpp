// SPDX-License-Identifier: Apache-2.0
#include "signals.hpp"

#include <annulus/io/result_file.hpp>
#include <annulus/job/stop_request.hpp>

#include "standard_output.hpp"

#include <array>
#include <csignal>

namespace annulus::app {

namespace {

extern "C" void stop_or_end(int signal) {
  if (take_stop_signal(signal)) { return; }
  print_open_ending();
  remove_unfinished_results();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void tidy_up_on(int signal) {
  struct sigaction present{};
  if (::sigaction(signal, nullptr, &present) != 0) { return; }
  if ((present.sa_flags & SA_SIGINFO) != 0 || present.sa_handler != SIG_DFL) { return; }
  struct sigaction wanted{};
  wanted.sa_handler = stop_or_end;
  wanted.sa_flags = SA_RESTART;   // of a signal that only asks to stop, what is being written or waited for notices nothing
  ::sigfillset(&wanted.sa_mask);  // one at a time
  ::sigaction(signal, &wanted, nullptr);
}

}  // namespace

void tidy_up_on_signals() {
  constexpr std::array<int, 14> kEnding{SIGHUP,  SIGINT,  SIGQUIT, SIGPIPE, SIGALRM,   SIGTERM, SIGUSR1,
                                        SIGUSR2, SIGXCPU, SIGPOLL, SIGPROF, SIGVTALRM, SIGPWR,  SIGSTKFLT};
  for (const int signal : kEnding) { tidy_up_on(signal); }
  for (int signal = SIGRTMIN; signal <= SIGRTMAX; ++signal) { tidy_up_on(signal); }
  std::signal(SIGXFSZ, SIG_IGN);
}

}  // namespace annulus::app
