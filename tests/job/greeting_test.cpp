// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/greeting.hpp>

#include <annulus_test.hpp>

#include <string>
#include <vector>

using namespace annulus;

TEST_CASE("the greeting is 64 bytes: name, version and the state of git, padded with NUL, in places that never change") {
  const Greeting greeting = greeting_of("1.2.3", "v1.2.3-4-gabcdef0-dirty");

  const std::string bytes(greeting.data(), greeting.size());

  REQUIRE(bytes.size() == 64);
  CHECK(bytes.substr(0, 8) == std::string("annulus\0", 8));
  CHECK(bytes.substr(8, 24) == std::string("1.2.3") + std::string(19, '\0'));
  CHECK(bytes.substr(32) == std::string("v1.2.3-4-gabcdef0-dirty") + std::string(9, '\0'));
}

TEST_CASE("a version longer than its field is cut and still tells programs apart") {
  const std::string version(40, '1');

  CHECK(greeting_of(version, "a") == greeting_of(version + "2", "a"));
  CHECK(greeting_of(version, "a") != greeting_of(version, "b"));
}

TEST_CASE("greetings that are alike have no difference, and the first rank that differs from rank 0 is named with both versions") {
  const Greeting own = greeting_of("1.2.3", "abc");
  const Greeting older = greeting_of("1.2.2", "abc");

  CHECK_FALSE(difference_of(std::vector<Greeting>{own, own, own}).has_value());
  CHECK(difference_of(std::vector<Greeting>{own, own, older, older}) ==
        "rank 0 runs annulus 1.2.3 (abc) and rank 2 runs annulus 1.2.2 (abc); all ranks must run the same program");
}

TEST_CASE("bytes that are no greeting are named as such, and nothing in a greeting can garble a terminal") {
  Greeting foreign{};
  foreign.fill('x');
  Greeting garbled = greeting_of("1\x1b[2J", "abc");

  const std::vector<Greeting> greetings{garbled, foreign};

  CHECK(difference_of(greetings) ==
        "rank 0 runs annulus 1?[2J (abc) and rank 1 runs a program that does not greet as annulus does; all ranks "
        "must run the same program");
}
