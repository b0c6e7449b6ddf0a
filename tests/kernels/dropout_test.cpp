// SPDX-License-Identifier: Apache-2.0
// Which probabilities are dropped: a function of seed, batch entry, head, query and key alone.
#include <annulus/kernels/dropout.hpp>

#include <annulus_test.hpp>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

using namespace annulus::kernels;

namespace {

std::vector<float> row(const Dropout& dropout, std::int64_t batch, std::int64_t head, std::int64_t query, std::int64_t keys) {
  std::vector<float> factors(static_cast<std::size_t>(keys));
  DropoutRow(dropout, batch, head, query).factors(0, 1, keys, factors.data());
  return factors;
}

}  // namespace

TEST_CASE("the factors of many keys are those of each, wherever they begin and however far apart they are") {
  const Dropout dropout{0.4, 77, 0};
  const DropoutRow draws(dropout, 3, 5, std::int64_t{1} << 40);
  for (const std::int64_t first : {std::int64_t{0}, std::int64_t{1}, std::int64_t{3}, std::int64_t{63}, (std::int64_t{1} << 34) - 2}) {
    for (const std::int64_t stride : {1, 2, 5}) {
      for (const std::int64_t count : {1, 4, 66, 200}) {
        std::vector<float> factors(static_cast<std::size_t>(count) + 1, -1.0F);
        draws.factors(first, stride, count, factors.data());
        for (std::int64_t i = 0; i < count; ++i) {
          REQUIRE(factors[static_cast<std::size_t>(i)] == static_cast<float>(draws.factor(first + i * stride)));
        }
        REQUIRE(factors.back() == -1.0F);
      }
    }
  }
}

TEST_CASE("as many are dropped as were asked for, and the mean of the factors is 1") {
  constexpr std::int64_t kKeys = 1000;
  constexpr std::int64_t kQueries = 400;
  for (const double probability : {0.1, 0.5, 0.9}) {
    const Dropout dropout{probability, 1, 0};
    double dropped = 0;
    for (std::int64_t query = 0; query < kQueries; ++query) {
      for (const float factor : row(dropout, 0, 0, query, kKeys)) {
        if (factor == 0.0F) {
          ++dropped;
        } else {
          REQUIRE(factor == static_cast<float>(1.0 / (1.0 - probability)));
        }
      }
    }
    const double share = dropped / (kKeys * kQueries);
    CHECK(std::abs(share - probability) < 5 * std::sqrt(probability * (1 - probability) / (kKeys * kQueries)));
  }
  for (const float factor : row({0.0, 1, 0}, 0, 0, 0, 100)) { CHECK(factor == 1.0F); }
}

TEST_CASE("seed, batch entry, head and query each give other draws, no more alike than chance has it") {
  constexpr std::int64_t kKeys = 20000;
  const std::vector<float> one = row({0.5, 1, 0}, 2, 3, 4, kKeys);
  CHECK(one == row({0.5, 1, 0}, 2, 3, 4, kKeys));
  for (const std::vector<float>& other :
       {row({0.5, 2, 0}, 2, 3, 4, kKeys), row({0.5, 1, 0}, 3, 3, 4, kKeys), row({0.5, 1, 0}, 2, 2, 4, kKeys),
        row({0.5, 1, 0}, 3, 2, 4, kKeys), row({0.5, 1, 0}, 2, 3, 5, kKeys)}) {
    std::int64_t alike = 0;
    for (std::size_t i = 0; i < one.size(); ++i) { alike += one[i] == other[i] ? 1 : 0; }
    CHECK(std::abs(static_cast<double>(alike) / kKeys - 0.5) < 5 * 0.5 / std::sqrt(static_cast<double>(kKeys)));
  }
}

TEST_CASE("a probability that keeps less than a draw in 2^32 keeps nothing, and none is lost to rounding") {
  CHECK(DropoutRow({1.0 - 0x1p-40, 1, 0}, 0, 0, 0).factor(0) == 0.0);
  CHECK(DropoutRow({0x1p-40, 1, 0}, 0, 0, 0).factor(0) == 1.0 / (1.0 - 0x1p-40));
}
