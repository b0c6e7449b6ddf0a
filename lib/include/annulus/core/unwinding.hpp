// SPDX-License-Identifier: Apache-2.0
// A destructor may run because an exception is on its way. Then peers may be gone and a device may stand behind one of them, so nothing
// that waits may be called: no collective call, no synchronisation, no cudaFree. What is left behind ends with the process.
#pragma once

#include <exception>

namespace annulus {

/// Whether the calling thread is unwinding: for functions that destructors of several owners call.
inline bool unwinding() noexcept { return std::uncaught_exceptions() > 0; }

/// A member by which a destructor tells an exception that came after its owner was made from one that was under way before.
class Unwinding {
 public:
  bool now() const noexcept { return std::uncaught_exceptions() > at_start_; }

 private:
  int at_start_ = std::uncaught_exceptions();
};

}  // namespace annulus
