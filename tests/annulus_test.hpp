// SPDX-License-Identifier: Apache-2.0
// The one header a test includes for its framework: Catch2 2.13 or 3, whichever the build found.
#pragma once

#include <string>
#include <string_view>

#if ANNULUS_CATCH2_MAJOR >= 3
#include <catch2/catch_all.hpp>
using Catch::Approx;  // where Catch2 2.13 has it
#else
#include <catch2/catch.hpp>
#endif

namespace annulus::test {

/// Says that this case cannot run here and why; the caller returns next. The program then exits with 77, which ctest counts as skipped,
/// unless something failed. (Catch2 2.13 has no SKIP.) Every rank of a test must come to the same decision.
void skip(std::string_view reason);

/// Matches strings that contain `text`; Catch2 3 gave its matcher another name.
inline auto contains_text(const std::string& text) {
#if ANNULUS_CATCH2_MAJOR >= 3
  return Catch::Matchers::ContainsSubstring(text);
#else
  return Catch::Matchers::Contains(text);
#endif
}

}  // namespace annulus::test
