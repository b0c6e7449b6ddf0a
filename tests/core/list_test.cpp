// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/list.hpp>

#include <annulus_test.hpp>

#include <cstdint>
#include <limits>
#include <vector>

using namespace annulus;

TEST_CASE("a list is a vector that is indexed by int64") {
  List<int> list{3, 1, 4};
  const std::int64_t last = 2;

  list[last] += 1;
  list.push_back(9);

  CHECK(list[0] == 3);
  CHECK(list[last] == 5);
  CHECK(list.at(3) == 9);
  CHECK(list == List<int>{3, 1, 5, 9});
  list = std::vector<int>{7};
  CHECK(list == List<int>(std::int64_t{1}, 7));
  List<bool> marks(2, false);
  marks[1] = true;
  CHECK((!marks[0] && marks[1]));
}

TEST_CASE("what is not in a list is not reached") {
  const List<int> list{3, 1, 4};

  CHECK_THROWS_AS(list.at(3), AssertionFailure);
  CHECK_THROWS_AS(list.at(-1), AssertionFailure);
  CHECK_THROWS_AS(list.at(std::numeric_limits<std::int64_t>::min()), AssertionFailure);
  CHECK_THROWS_AS(List<int>().at(0), AssertionFailure);
#ifndef NDEBUG
  CHECK_THROWS_AS(list[3], AssertionFailure);
  CHECK_THROWS_AS(list[-1], AssertionFailure);
#endif
}
