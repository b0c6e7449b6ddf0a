// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/at_abort.hpp>

#include <annulus_test.hpp>

using namespace annulus;

namespace {

int first_calls = 0;
int second_calls = 0;

void first() noexcept { ++first_calls; }
void second() noexcept { ++second_calls; }

}  // namespace

TEST_CASE("an abort calls every hook once, however often it was registered") {
  run_abort_hooks();
  CHECK(first_calls == 0);

  at_abort(first);
  at_abort(second);
  at_abort(first);
  run_abort_hooks();

  CHECK(first_calls == 1);
  CHECK(second_calls == 1);
}
