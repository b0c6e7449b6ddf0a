// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/agreement.hpp>

#include <annulus_test.hpp>

#include "mpi_world.hpp"

#include <string>
#include <vector>

using namespace annulus;

namespace {

/// What this rank is told when the ranks' facts are compared; empty if they are alike.
std::string verdict(const std::vector<Fact>& facts) {
  try {
    require_same(test::world(), facts);
  } catch (const AgreedError& error) {
    CHECK(error.code() == ExitCode::bad_input);
    return error.what();
  }
  return {};
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("facts that are alike pass, whatever bytes they hold and whatever their notes say") {
  const std::string own_note = std::to_string(test::world().rank());

  CHECK(verdict({}).empty());
  CHECK(verdict({{"a", std::string("1\0\xff", 3)}, {"b", ""}, {"c", "3 4 ", own_note}}).empty());
}

TEST_CASE("the first fact that differs is named on every rank, with the lowest rank that differs in it") {
  const std::int64_t rank = test::world().rank();
  const std::int64_t last = test::world().size() - 1;

  const std::string one = verdict({{"a", "1"}, {"b", rank == last ? "3" : "2"}, {"c", std::to_string(rank)}});
  const std::string all = verdict({{"a", "1"}, {"c", std::to_string(rank)}});

  CHECK(contains(one, "rank 0 ("));
  CHECK(contains(one, " has b 2 and rank " + std::to_string(last) + " ("));
  CHECK(contains(one, " has b 3"));
  CHECK(contains(all, " has c 0 and rank 1 ("));
  CHECK(contains(all, " has c 1"));
}

TEST_CASE("a fact that one rank has more, and one of another name, are differences") {
  const bool odd = test::world().rank() == 1;

  std::vector<Fact> facts{{"a", "1"}};
  if (odd) { facts.push_back({"b", "2"}); }
  const std::string more = verdict(facts);
  const std::string other = verdict({{odd ? "x" : "a", "1"}});

  CHECK(contains(more, " has nothing more and rank 1 ("));
  CHECK(contains(other, " has a 1 and rank 1 ("));
}

TEST_CASE("after a difference the ranks still understand each other") {
  CHECK_FALSE(verdict({{"a", std::to_string(test::world().rank())}}).empty());

  CHECK(test::world().sum(std::int64_t{1}) == test::world().size());
}
