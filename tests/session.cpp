// SPDX-License-Identifier: Apache-2.0
#define CATCH_CONFIG_RUNNER
#include "session.hpp"

#include "annulus_test.hpp"

#include <cstdio>
#include <string>

namespace annulus::test {
namespace {

int skipped_cases = 0;

}  // namespace

void skip(std::string_view reason) {
  ++skipped_cases;
  std::fprintf(stderr, "skipped: %s\n", std::string(reason).c_str());
}

int run_session(int argc, char** argv) {
  Catch::Session session;
#if ANNULUS_CATCH2_MAJOR < 3
  session.configData().warnings = static_cast<Catch::WarnAbout::What>(session.configData().warnings | Catch::WarnAbout::NoTests);
#endif
  if (session.applyCommandLine(argc, argv) != 0 || session.run() != 0) { return kFailed; }
  return skipped_cases > 0 ? kSkipped : kPassed;
}

}  // namespace annulus::test
