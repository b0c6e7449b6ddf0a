// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/affinity.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include <cerrno>
#include <cstring>
#include <vector>

using namespace annulus;

namespace {

/// A kernel that knows `cpus` CPUs and allows those of `mask`.
AskAffinity kernel_of(std::size_t cpus, const CpuMask& mask) {
  return [=](std::size_t bytes, void* out) {
    if (bytes < cpus / 8) { return EINVAL; }
    std::memcpy(out, mask.data(), mask.size() * sizeof(mask[0]));
    return 0;
  };
}

}  // namespace

TEST_CASE("a mask of 4,096 CPUs is read whole") {
  CpuMask all(4096 / 64, ~std::uint64_t{0});
  all[63] = 1;  // CPU 4032 and none after it

  const CpuMask read = allowed_cpus(kernel_of(4096, all));

  CHECK(count_of(read) == 4033);
  REQUIRE(read.size() >= all.size());
  CHECK(read[63] == 1);
}

TEST_CASE("kernels of any number of CPUs are asked with a mask that is long enough") {
  for (const std::size_t cpus : {64U, 1024U, 1088U, 2048U, 8192U, 131072U}) {
    const CpuMask all(cpus / 64, ~std::uint64_t{0});

    CHECK(count_of(allowed_cpus(kernel_of(cpus, all))) == static_cast<std::int64_t>(cpus));
  }
}

TEST_CASE("a system that does not say which CPUs there are is a failure with its reason, not one CPU") {
  CHECK_THROWS_AS(allowed_cpus([](std::size_t, void*) { return EPERM; }), RuntimeFailure);
  CHECK_THROWS_AS(allowed_cpus([](std::size_t, void*) { return EINVAL; }), RuntimeFailure);
}

TEST_CASE("masks of different lengths overlap where they share a CPU") {
  CpuMask high(64, 0);
  high[40] = 2;
  CpuMask other = high;
  other.resize(128, 0);

  CHECK(overlap(high, other));
  CHECK_FALSE(overlap(high, CpuMask(16, ~std::uint64_t{0})));
}

TEST_CASE("the system names at least one CPU for this process") { CHECK(count_of(allowed_cpus()) >= 1); }
