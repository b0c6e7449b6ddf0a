// SPDX-License-Identifier: Apache-2.0
// The fused kernel alone, against fp64 computed row by row.
#include <annulus_test.hpp>

#include "fused_problem.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace annulus {
namespace {

using fused_test::compare;
using fused_test::Device;
using fused_test::Error;
using fused_test::plain;
using fused_test::Problem;
namespace fused = kernels::cuda::fused;

const std::vector<std::int64_t> kHeadDims{16, 24, 32, 48, 64, 96, 128, 256};

bool hopper() {
  int count = 0;
  cudaDeviceProp properties{};
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0 && cudaGetDeviceProperties(&properties, 0) == cudaSuccess &&
         properties.major == 9;
}

bool skipped() {
  if (hopper()) { return false; }
  test::skip("this machine has no Hopper GPU");
  return true;
}

void run(Device& device) {
  device.run(nullptr);
  must(cudaDeviceSynchronize(), "run");
}

const Noise& noise(DType dtype) {
  static const Noise bf16(DType::bf16, 100003);
  static const Noise fp16(DType::fp16, 100003);
  return dtype == DType::fp16 ? fp16 : bf16;
}

/// bf16 operands with fp32 sums: probabilities and O are rounded once each, 2^-9 relative at most; measured errors are 2.0e-3 to 2.4e-3.
double rms_limit(DType dtype) { return dtype == DType::fp16 ? 5e-4 : 4e-3; }

void check(const Problem& problem, const Device& device, std::int64_t samples = 0) {
  const Error error = compare(problem, device, samples, kSeed);
  CHECK(error.rows > 0);
  CHECK(error.misplaced == 0);
  CHECK(error.relative_rms < rms_limit(problem.dtype));
  CHECK(error.lse < 1e-3);
}

struct Bits {
  std::vector<std::uint16_t> out;
  std::vector<std::uint32_t> lse;
  bool operator==(const Bits&) const = default;
};
Bits bits_of(Device& device) {
  run(device);
  return {device.out().host<std::uint16_t>(), device.lse().host<std::uint32_t>()};
}

std::vector<std::uint16_t> normal_bits(std::int64_t count, std::uint32_t seed, DType dtype = DType::bf16) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> bits(as_size(count));
  for (auto& word : bits) { word = dtype == DType::fp16 ? kernels::to_fp16_bits(normal(engine)) : kernels::to_bf16_bits(normal(engine)); }
  return bits;
}

}  // namespace

TEST_CASE("every head_dim and tile remainder agrees with fp64, dense and causal") {
  if (skipped()) { return; }
  for (const std::int64_t d : kHeadDims) {
    for (const DType dtype : {DType::bf16, DType::fp16}) {
      for (const bool causal : {false, true}) {
        for (const std::int64_t n : {1, 5, 63, 64, 65, 127, 128, 129, 191, 192, 193, 320, 385, 777}) {
          Problem problem = plain(2, n, 3, d, causal);
          problem.dtype = dtype;
          for (const auto order : {fused::KeyOrder::cyclic, fused::KeyOrder::arrival}) {
            problem.order = order;
            CAPTURE(d, dtype == DType::fp16, causal, n, order == fused::KeyOrder::arrival);
            Device device(problem, noise(dtype));
            run(device);
            check(problem, device, 60);
          }
        }
      }
    }
  }
}

TEST_CASE("one-hot operands land in their places") {
  if (skipped()) { return; }
  // Key j matches query j alone, strongly, and V's row j is j's digits: O's row is V's row, wherever a layout would move it.
  for (const std::int64_t d : kHeadDims) {
    const std::int64_t n = d;
    Problem problem = plain(1, n, 1, d);
    std::vector<std::uint16_t> q(as_size(n * d), kernels::to_bf16_bits(0.0F));
    std::vector<std::uint16_t> v(as_size(n * d));
    for (std::int64_t i = 0; i < n; ++i) { q[as_size(i * d + i)] = kernels::to_bf16_bits(64.0F); }
    for (std::int64_t i = 0; i < n * d; ++i) { v[as_size(i)] = kernels::to_bf16_bits(static_cast<float>((i * 37) % 251 - 125)); }
    Device device(problem, q, q, v);
    CAPTURE(d);
    run(device);
    const auto out = device.out().host<std::uint16_t>();
    CHECK(out == v);
  }
}

TEST_CASE("head dims between the shapes use the next one") {
  if (skipped()) { return; }
  for (const std::int64_t d : {8, 40, 56, 72, 80, 104, 120, 160, 192, 248}) {
    const Problem problem = plain(1, 300, 2, d);
    Device device(problem, noise(DType::bf16));
    CAPTURE(d);
    run(device);
    check(problem, device, 100);
  }
}

TEST_CASE("grouped heads read their KV head") {
  if (skipped()) { return; }
  Problem problem = plain(2, 333, 8, 64);
  problem.kv_heads = 2;
  problem.branches[0].kv_heads = 2;
  Device device(problem, noise(DType::bf16));
  run(device);
  check(problem, device);
}

TEST_CASE("dilated rows are read and written in place, also where the rate divides nothing") {
  if (skipped()) { return; }
  for (const std::int64_t d : {24, 48, 128}) {
    for (const std::int64_t r : {2, 3, 4, 16}) {
      for (const bool causal : {false, true}) {
        Problem problem = plain(1, 1999, 4, d, causal);
        problem.branches = {{801, r, 0, 4}};
        Device device(problem, noise(DType::bf16));
        CAPTURE(d, r, causal);
        run(device);
        check(problem, device, 200);
      }
    }
  }
}

TEST_CASE("segments shorter than a key tile are right, one after the other") {
  if (skipped()) { return; }
  for (const std::int64_t d : kHeadDims) {
    for (const std::int64_t w : {1, 40, 100, 130}) {
      Problem problem = plain(1, 3000, 2, d);
      problem.branches = {{w, 1, 0, 2}};
      Device device(problem, noise(DType::bf16));
      CAPTURE(d, w);
      run(device);
      check(problem, device, 300);
    }
  }
}

TEST_CASE("the same bits from any number of ranks, and from every repetition") {
  if (skipped()) { return; }
  for (const std::int64_t d : kHeadDims) {
    for (const bool causal : {false, true}) {
      for (const std::int64_t r : {1, 2}) {
        Problem problem = plain(1, 2048 * r, 2, d, causal);
        problem.branches = {{2048 * r, r, 0, 2}};
        Device one(problem, noise(DType::bf16));
        const Bits expected = bits_of(one);
        CAPTURE(d, causal, r);
        check(problem, one, 40);
        for (const std::int64_t ranks : {2, 4, 8, 16}) {
          problem.ranks = ranks;
          Device many(problem, noise(DType::bf16));
          CAPTURE(ranks);
          CHECK(bits_of(many) == expected);
          CHECK(bits_of(many) == expected);
        }
      }
    }
  }
}

TEST_CASE("tensors of more than 2^31 elements are read and written where they are") {
  if (skipped()) { return; }
  Problem problem = plain(1, 1300003, 16, 128);
  problem.branches = {{1024, 1, 0, 16}};
  std::size_t free = 0;
  std::size_t total = 0;
  must(cudaMemGetInfo(&free, &total), "memory");
  if (free < (std::size_t{24} << 30)) {
    test::skip("less than 24 GiB of device memory are free");
    return;
  }
  Device device(problem, noise(DType::bf16));
  run(device);
  check(problem, device, 300);
}

TEST_CASE("uneven shards and odd lengths are right, whatever their bits") {
  if (skipped()) { return; }
  for (const bool causal : {false, true}) {
    for (const std::int64_t ranks : {3, 5}) {
      Problem problem = plain(1, 1111, 2, 64, causal);
      problem.branches = {{700, 3, 0, 2}};
      problem.ranks = ranks;
      problem.order = fused::KeyOrder::arrival;
      Device device(problem, noise(DType::bf16));
      CAPTURE(causal, ranks);
      run(device);
      check(problem, device, 200);
    }
  }
}

TEST_CASE("a maximum that is kept too low is raised, and the same bits come from any number of ranks") {
  if (skipped()) { return; }
  constexpr std::int64_t n = 1024;
  constexpr std::int64_t d = 64;
  struct Rise {
    const char* name;
    std::int64_t first;  // keys scaled up
    std::int64_t count;
    float factor;
  };
  for (const Rise& rise : {Rise{"first tile", 0, 1, 400.0F}, Rise{"last tile", n - 1, 1, 400.0F}, Rise{"middle", 500, 7, 30.0F},
                           Rise{"quarter", 256, 256, 400.0F}, Rise{"everywhere", 0, n, 40.0F}, Rise{"real layers", 0, n, 7.0F}}) {
    for (const DType dtype : {DType::bf16, DType::fp16}) {
      for (const bool causal : {false, true}) {
        Problem problem = plain(1, n, 2, d, causal);
        problem.dtype = dtype;
        const auto scaled = [&](std::uint16_t bits) {
          return dtype == DType::fp16 ? kernels::to_fp16_bits(kernels::from_fp16_bits(bits) * rise.factor)
                                      : kernels::to_bf16_bits(kernels::from_bf16_bits(bits) * rise.factor);
        };
        auto k = normal_bits(n * 2 * d, 2, dtype);
        for (std::int64_t i = rise.first * 2 * d; i < (rise.first + rise.count) * 2 * d; ++i) { k[as_size(i)] = scaled(k[as_size(i)]); }
        const auto q = normal_bits(n * 2 * d, 1, dtype);
        const auto v = normal_bits(n * 2 * d, 3, dtype);
        Device one(problem, q, k, v);
        CAPTURE(rise.name, dtype == DType::fp16, causal);
        const Bits expected = bits_of(one);
        const Error error = compare(problem, one, 0, kSeed);
        CHECK(error.misplaced == 0);
        CHECK(error.relative_rms < rms_limit(dtype));
        CHECK(error.lse < 0.05);  // scores of thousands: fp32's own rounding of a score is 2^-24 of that
        for (const std::int64_t ranks : {2, 4, 8}) {
          problem.ranks = ranks;
          Device many(problem, q, k, v);
          CAPTURE(ranks);
          CHECK(bits_of(many) == expected);
        }
      }
    }
  }
}

TEST_CASE("what lies past the last key reaches no row") {
  if (skipped()) { return; }
  // Two segments; the second one's K and V are NaN, and the first one's tiles read over the border.
  constexpr std::int64_t n = 300;
  constexpr std::int64_t d = 128;
  Problem problem = plain(1, 2 * n, 1, d);
  problem.branches = {{n, 1, 0, 1}};
  auto k = normal_bits(2 * n * d, 2);
  auto v = normal_bits(2 * n * d, 3);
  for (std::int64_t i = n * d; i < 2 * n * d; ++i) { k[as_size(i)] = v[as_size(i)] = 0x7FC0; }
  Device device(problem, normal_bits(2 * n * d, 1), k, v);
  run(device);
  const auto out = device.out().host<std::uint16_t>();
  CHECK(std::none_of(out.begin(), out.begin() + n * d, [](std::uint16_t bits) { return std::isnan(kernels::from_bf16_bits(bits)); }));
  CHECK(std::all_of(out.begin() + n * d, out.end(), [](std::uint16_t bits) { return std::isnan(kernels::from_bf16_bits(bits)); }));
}

TEST_CASE("buffers hold nothing that is read before it is written") {
  if (skipped()) { return; }
  Problem problem = plain(1, 1024, 2, 128, true);
  problem.ranks = 4;
  Device device(problem, noise(DType::bf16));
  const Bits expected = bits_of(device);
  for (const int byte : {0x00, 0x71, 0x7F, 0xFF}) {
    device.poison(byte);
    CHECK(bits_of(device) == expected);
  }
}

TEST_CASE("a thousand repetitions give the same bits, and ten thousand launches end") {
  if (skipped()) { return; }
  Problem causal = plain(2, 2048, 4, 128, true);
  Problem ragged = plain(1, 10001, 4, 48);
  ragged.branches = {{1024, 1, 0, 2}, {5792, 2, 2, 2}};
  for (const Problem& problem : {causal, ragged}) {
    Device device(problem, noise(DType::bf16));
    const Bits expected = bits_of(device);
    for (int i = 0; i < 1000; ++i) {
      device.run(nullptr);
      if (i % 100 == 99) { CHECK(bits_of(device) == expected); }
    }
    for (int i = 0; i < 10000; ++i) { device.run(nullptr); }
    CHECK(bits_of(device) == expected);
  }
}

}  // namespace annulus
