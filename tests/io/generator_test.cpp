// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/io/source.hpp>
#include <annulus/kernels/philox.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <random>
#include <vector>

namespace {

using namespace annulus;

Problem make_problem(std::int64_t batch, std::int64_t seq_len, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                     DType dtype) {
  Problem problem;
  problem.batch = batch;
  problem.seq_len = seq_len;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.head_dim = head_dim;
  problem.dtype = dtype;
  return problem;
}

/// All of one batch entry as fp32.
std::vector<float> read_all(const TensorSource& source, Tensor tensor, std::int64_t batch = 0) {
  const Problem& problem = source.problem();
  const std::int64_t heads = tensor == Tensor::q ? problem.heads : problem.kv_heads;
  std::vector<float> values(static_cast<std::size_t>(problem.seq_len * heads * problem.head_dim));
  source.read(tensor, batch, 0, problem.seq_len, DType::fp32, values.data());
  return values;
}

std::array<std::uint32_t, 4> philox_once(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  kernels::PhiloxWords<1> words{{{counter[0]}, {counter[1]}, {counter[2]}, {counter[3]}}};
  kernels::philox4x32_10(words, key);
  return {words[0][0], words[1][0], words[2][0], words[3][0]};
}

double correlation(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) { sum += static_cast<double>(a[i]) * static_cast<double>(b[i]); }
  return sum / static_cast<double>(std::min(a.size(), b.size()));
}

}  // namespace

TEST_CASE("Philox4x32-10 gives the published answers", "[io][generator]") {
  using Words = std::array<std::uint32_t, 4>;
  CHECK(philox_once({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox_once({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
        Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox_once({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("the generator is Box and Muller's transform of Philox words, element by element", "[io][generator]") {
  const std::uint64_t seed = 0x0123456789abcdefU;
  const auto source = make_generator(make_problem(2, 301, 3, 1, 7, DType::fp32), seed);
  for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v}) {
    const auto values = read_all(*source, tensor, 1);
    double worst = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::uint64_t index = values.size() + i;  // batch entry 1
      const auto words = philox_once({static_cast<std::uint32_t>(index / 4), 0, static_cast<std::uint32_t>(tensor), 0},
                                     {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)});
      const std::size_t pair = index % 4 / 2 * 2;
      const double radius = std::sqrt(-2 * std::log((words[pair] + 0.5) / 4294967296.0));
      const std::uint32_t turn = words[pair + 1];
      const double angle = ((turn >> 30U) + ((turn << 2U) + 0.5) / 4294967296.0 - 0.5) * std::numbers::pi / 2;
      const double expected = radius * (index % 2 == 0 ? std::cos(angle) : std::sin(angle));
      worst = std::max(worst, std::abs(static_cast<double>(values[i]) - expected) / std::max(std::abs(expected), 1e-6));
    }

    CHECK(worst < 0x1p-23);
  }
}

TEST_CASE("a value does not depend on how rows are read nor on the number of readers", "[io][generator]") {
  const unsigned seed = std::random_device{}();
  INFO("seed " << seed);
  std::mt19937 random(seed);
  for (const DType dtype : {DType::fp32, DType::fp16, DType::bf16}) {
    for (int repetition = 0; repetition < 10; ++repetition) {
      const auto pick = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
      const std::int64_t kv_heads = pick(1, 3);
      const Problem problem = make_problem(pick(1, 3), pick(1, 200), kv_heads * pick(1, 3), kv_heads, pick(1, 70), dtype);
      const auto source = make_generator(problem, seed);
      for (const Tensor tensor : {Tensor::q, Tensor::k}) {
        const std::int64_t batch = pick(0, static_cast<int>(problem.batch - 1));
        const std::int64_t row = (tensor == Tensor::q ? problem.heads : problem.kv_heads) * problem.head_dim;
        std::vector<std::uint8_t> whole(static_cast<std::size_t>(problem.seq_len * row * size_of(dtype)));
        std::vector<std::uint8_t> pieces(whole.size());
        source->read(tensor, batch, 0, problem.seq_len, dtype, whole.data());
        for (std::int64_t first = 0; first < problem.seq_len;) {
          const std::int64_t count = std::min(problem.seq_len - first, pick(0, 40));
          const auto reader = make_generator(problem, seed);
          reader->read(tensor, batch, first, count, dtype, pieces.data() + first * row * size_of(dtype));
          first += count;
        }
        REQUIRE(whole == pieces);
      }
    }
  }
}

TEST_CASE("any number of threads fills a read with the same bits and writes nothing beside it", "[io][generator]") {
  const unsigned seed = std::random_device{}();
  INFO("seed " << seed);
  std::mt19937 random(seed);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  constexpr std::size_t kMargin = 8;
  for (const DType dtype : {DType::fp32, DType::fp16, DType::bf16}) {
    for (int repetition = 0; repetition < 8; ++repetition) {
      // Rows of an odd number of elements, so that reads start and end anywhere; the longer ones are divided among threads.
      const Problem problem = make_problem(2, 3001, 3, 1, 2 * pick(1, 40) + 1, repetition % 2 == 0 ? dtype : DType::fp32);
      const std::int64_t first = pick(0, 3000);
      const std::int64_t count = pick(0, static_cast<int>(3001 - first));
      const std::int64_t bytes = count * problem.heads * problem.head_dim * size_of(dtype);
      std::vector<std::uint8_t> alone;
      for (const int threads : {1, 2, 5}) {
        INFO("dtype " << to_string(dtype) << ", head_dim " << problem.head_dim << ", rows " << first << " + " << count << ", threads "
                      << threads);
        std::vector<std::uint8_t> filled(static_cast<std::size_t>(bytes) + 2 * kMargin, 0xa5);
        make_generator(problem, seed, threads)->read(Tensor::q, 1, first, count, dtype, filled.data() + kMargin);
        if (threads == 1) { alone = filled; }
        REQUIRE(filled == alone);
        REQUIRE(std::all_of(filled.begin(), filled.begin() + kMargin, [](std::uint8_t byte) { return byte == 0xa5; }));
        REQUIRE(std::all_of(filled.end() - kMargin, filled.end(), [](std::uint8_t byte) { return byte == 0xa5; }));
      }
    }
  }
}

TEST_CASE("the generator's bits are the same on every machine, build and number of threads", "[io][generator]") {
  const Problem problem = make_problem(1, 1 << 12, 2, 2, 64, DType::fp32);
  for (const int threads : {1, 3}) {
    const auto values = read_all(*make_generator(problem, 1, threads), Tensor::q);
    std::uint64_t hash = 0xcbf29ce484222325U;  // FNV-1a over the words
    for (const float value : values) { hash = (hash ^ std::bit_cast<std::uint32_t>(value)) * 0x100000001b3U; }

    CHECK(hash == 0x24e1655266a34dfbU);
  }
}

TEST_CASE("16-bit generators hold the fp32 values rounded once, whatever dtype they are read in", "[io][generator]") {
  const Problem problem = make_problem(1, 333, 2, 2, 17, DType::fp32);
  const auto wide = read_all(*make_generator(problem, 5), Tensor::v);
  for (const DType dtype : {DType::fp16, DType::bf16}) {
    Problem narrow_problem = problem;
    narrow_problem.dtype = dtype;
    const auto source = make_generator(narrow_problem, 5);
    const auto widened = read_all(*source, Tensor::v);
    std::vector<std::uint16_t> bits(wide.size());
    source->read(Tensor::v, 0, 0, problem.seq_len, dtype, bits.data());
    bool equal = true;
    for (std::size_t i = 0; i < wide.size(); ++i) {
      const std::uint16_t expected = dtype == DType::fp16 ? kernels::to_fp16_bits(wide[i]) : kernels::to_bf16_bits(wide[i]);
      equal = equal && bits[i] == expected;
      equal = equal && widened[i] == (dtype == DType::fp16 ? kernels::from_fp16_bits(expected) : kernels::from_bf16_bits(expected));
    }

    CHECK(equal);
  }
}

TEST_CASE("values are standard normal and independent between seeds, tensors and neighbours", "[io][generator]") {
  const Problem problem = make_problem(1, 8192, 2, 2, 64, DType::fp32);  // 2^20 values: the mean's sigma is 2^-10
  const auto q = read_all(*make_generator(problem, 1), Tensor::q);
  const auto k = read_all(*make_generator(problem, 1), Tensor::k);
  const auto v = read_all(*make_generator(problem, 1), Tensor::v);
  const auto other_low = read_all(*make_generator(problem, 2), Tensor::q);
  const auto other_high = read_all(*make_generator(problem, 1 + (std::uint64_t{1} << 32U)), Tensor::q);
  const double bound = 5.0 / 1024;  // five sigma

  double mean = 0;
  double square = 0;
  double cube = 0;
  double fourth = 0;
  double beyond_two = 0;
  double below_half = 0;
  for (const float value : q) {
    const double x = static_cast<double>(value);
    mean += x;
    square += x * x;
    cube += x * x * x;
    fourth += x * x * x * x;
    beyond_two += std::abs(x) > 2 ? 1 : 0;
    below_half += x < 0.5 ? 1 : 0;
  }
  const auto n = static_cast<double>(q.size());
  CHECK(std::abs(mean / n) < bound);
  CHECK(std::abs(square / n - 1) < bound * std::sqrt(2.0));
  CHECK(std::abs(cube / n) < bound * std::sqrt(15.0));
  CHECK(std::abs(fourth / n - 3) < bound * std::sqrt(96.0));
  CHECK(std::abs(beyond_two / n - std::erfc(std::sqrt(2.0))) < bound * 0.21);
  CHECK(std::abs(below_half / n - (1 - std::erfc(0.5 / std::sqrt(2.0)) / 2)) < bound * 0.47);

  for (const auto* other : {&k, &v, &other_low, &other_high}) { CHECK(std::abs(correlation(q, *other)) < bound); }
  CHECK(std::abs(correlation(k, v)) < bound);
  for (const std::ptrdiff_t lag : {1, 2, 3, 4, 64, 128}) { CHECK(std::abs(correlation(q, {q.begin() + lag, q.end()})) < bound); }
}

TEST_CASE("elements past 2^34 have values of their own", "[io][generator]") {
  // 2^25 rows of 1024 elements: block numbers pass 2^32, and only a few rows are ever read.
  const auto source = make_generator(make_problem(1, std::int64_t{1} << 25, 8, 8, 128, DType::fp32), 3);
  std::vector<float> low(1024);
  std::vector<float> high(1024);
  source->read(Tensor::q, 0, 5, 1, DType::fp32, low.data());
  source->read(Tensor::q, 0, (std::int64_t{1} << 24) + 5, 1, DType::fp32, high.data());

  CHECK(low != high);
}

TEST_CASE("the generator refuses rows outside the problem and describes itself", "[io][generator]") {
  const auto source = make_generator(make_problem(1, 10, 1, 1, 64, DType::fp32), 42);
  std::vector<float> out(64 * 11);

  CHECK(source->describe() == "generator, seed 42");
  CHECK(source->problem().scale == 0.125);
  CHECK_THROWS_AS(source->read(Tensor::q, 0, 5, 6, DType::fp32, out.data()), InvalidArgument);
  CHECK_THROWS_AS(source->read(Tensor::q, 1, 0, 1, DType::fp32, out.data()), InvalidArgument);
  CHECK_THROWS_AS(source->read(Tensor::q, 0, -1, 1, DType::fp32, out.data()), InvalidArgument);
  CHECK_THROWS_AS(make_generator(source->problem(), 42, 0), InvalidArgument);
}
