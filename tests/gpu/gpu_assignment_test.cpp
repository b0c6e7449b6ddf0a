// SPDX-License-Identifier: Apache-2.0
#include <annulus/gpu/gpu_assignment.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include <vector>

using namespace annulus;

namespace {

std::string refusal(const std::vector<GpuClaim>& claims) {
  try {
    choose_devices(claims, false);
  } catch (const InvalidArgument& error) { return error.what(); }
  return {};
}

}  // namespace

TEST_CASE("ranks that see all GPUs of their hosts take the one of their place on the host") {
  const std::vector<GpuClaim> claims{{"a", 0, 2, {"A0", "A1"}}, {"b", 0, 1, {"B0", "B1"}}, {"a", 1, 2, {"A0", "A1"}}};

  CHECK(choose_devices(claims, false) == std::vector<int>{0, 0, 1});
}

TEST_CASE("a rank that the launcher shows one GPU takes it, whatever its place on the host") {
  const std::vector<GpuClaim> claims{{"a", 0, 2, {"A0"}}, {"a", 1, 2, {"A1"}}};

  CHECK(choose_devices(claims, false) == std::vector<int>{0, 0});
}

TEST_CASE("fewer GPUs than ranks on a host are refused, naming the host and --share-gpu") {
  const std::string text = refusal({{"a", 0, 3, {"A0", "A1"}}, {"a", 1, 3, {"A0", "A1"}}, {"a", 2, 3, {"A0", "A1"}}});

  CHECK(text.find("a has 2 GPUs for 3 ranks") != std::string::npos);
  CHECK(text.find("--share-gpu") != std::string::npos);
}

TEST_CASE("two ranks that are shown the same single GPU are refused, naming both") {
  const std::string text = refusal({{"a", 0, 2, {"A0"}}, {"a", 1, 2, {"A0"}}});

  CHECK(text.find("rank 0 (a) and rank 1 (a) have the same GPU, A0") != std::string::npos);
  CHECK(text.find("--share-gpu") != std::string::npos);
}

TEST_CASE("a rank that sees no GPU is refused even where GPUs may be shared") {
  const std::vector<GpuClaim> claims{{"a", 0, 2, {"A0"}}, {"a", 1, 2, {}}};

  CHECK_THROWS_AS(choose_devices(claims, true), InvalidArgument);
  CHECK(refusal(claims).find("rank 1 (a) sees no GPU") != std::string::npos);
}

TEST_CASE("ranks that share GPUs go round those of their host") {
  const std::vector<std::string> gpus{"A0", "A1"};
  std::vector<GpuClaim> claims;
  for (std::int64_t rank = 0; rank < 5; ++rank) { claims.push_back({"a", rank, 5, gpus}); }

  CHECK(choose_devices(claims, true) == std::vector<int>{0, 1, 0, 1, 0});
}
