// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus_test.hpp>

#include <functional>
#include <iostream>
#include <sys/wait.h>
#include <unistd.h>

namespace annulus::test {

/// Runs `body` in a child process, which never returns into the test framework; gives its wait status.
inline int in_child(const std::function<void()>& body) {
  std::cout.flush();  // or the child would print it again
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    try {
      body();
    } catch (...) { ::_exit(99); }
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

}  // namespace annulus::test
