// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/job/communicator.hpp>

#include <chrono>
#include <string_view>

namespace annulus {

/// Why a job stops before all of its work is done. Of several causes the ranks agree on the last of this list.
enum class StopCause { none, time_limit, user_signal, termination };

/// "its time limit", "SIGUSR1", "SIGTERM"; empty for none.
std::string_view describe(StopCause cause);

/// A wish that the job stops where it can go on later: between repetitions, rows, cases or parts of its work. Any rank may have it, by a
/// signal or by the clock; all ranks decide on it together, so that none waits in a message for one that has left.
///
///     StopRequest stop;                    // early: its time counts from here
///     stop.heed_signals();
///     stop.set_limit(3600);
///     for (const Part& part : parts) {     // the same on all ranks
///       if (stop.agreed(comm)) { break; }
///       work(part);
///     }
///
/// At most one lives in a process.
class StopRequest {
 public:
  StopRequest();
  /// No signal is heeded after it.
  ~StopRequest();
  StopRequest(const StopRequest&) = delete;
  StopRequest& operator=(const StopRequest&) = delete;

  /// From here on take_stop_signal() takes SIGUSR1 and SIGTERM as the wish to stop. For commands that ask agreed() again and again: a
  /// signal that nobody asks for would be lost.
  void heed_signals() noexcept;
  /// The wish arises `seconds` after construction; 0: never.
  void set_limit(double seconds) noexcept { limit_s_ = seconds; }

  /// Whether some rank wishes to stop. The same on all ranks, and once true always true; asking waits for all of them, as a barrier does.
  /// Collective. @param comm the whole job's
  bool agreed(const Communicator& comm);
  /// What was agreed on; the same on all ranks.
  StopCause cause() const noexcept { return agreed_; }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  double limit_s_ = 0;
  StopCause agreed_ = StopCause::none;
};

/// For signal handlers, async-signal-safe: notes `signal` where StopRequest heeds it. False if it does not, and at the second SIGTERM:
/// the signal then does what it would do otherwise.
bool take_stop_signal(int signal) noexcept;

}  // namespace annulus
