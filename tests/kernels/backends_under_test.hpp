// SPDX-License-Identifier: Apache-2.0
// Which backends the shared backend tests run on: the test is built once per backend with ANNULUS_TEST_BACKEND, its name in quotes.
#pragma once

#include <annulus/core/enums.hpp>

#include <vector>

namespace annulus::test {

inline std::vector<BackendKind> backends_under_test() { return {from_string<BackendKind>(ANNULUS_TEST_BACKEND).value()}; }

}  // namespace annulus::test
