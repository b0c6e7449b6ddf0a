// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/io/source.hpp>
#include <annulus/kernels/philox.hpp>

#include "element_convert.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>

// Every rank must see the same bits, whatever machine it runs on. libm chooses its code by CPU and changes with its version, hence the
// series below: they use IEEE additions, multiplications, divisions and square roots only, and this file is compiled without contraction to
// FMA.

namespace annulus {

namespace {

constexpr std::size_t kBlocks = 64;  ///< counters per pass: enough for vector loops, small enough for the first cache
constexpr std::int64_t kValuesPerBlock = 4;
constexpr std::int64_t kValuesPerPass = static_cast<std::int64_t>(kBlocks) * kValuesPerBlock;
constexpr std::int64_t kSerialPasses = 32;  ///< up to this many, starting threads costs more than it saves

/// (word + 1/2) / 2^32: never 0 nor 1; exact.
double open_unit(std::uint32_t word) {
  const double one_to_two = std::bit_cast<double>(0x3ff0000000000000U | (static_cast<std::uint64_t>(word) << 20U));
  return (one_to_two - 1.0) + 0x1p-33;
}

/// Natural logarithm of a positive normal number, relative error below 1e-11: x = 2^e m with m in [sqrt(1/2), sqrt(2)), and
/// log m = 2 atanh(z) = 2 (z + z^3/3 + z^5/5 + ...) for z = (m-1)/(m+1), |z| < 0.172.
double log_series(double x) {
  constexpr std::uint64_t kSqrtHalf = std::bit_cast<std::uint64_t>(0x1.6a09e667f3bcdp-1);
  constexpr std::uint64_t kOne = std::bit_cast<std::uint64_t>(1.0);
  constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  const std::uint64_t shifted = std::bit_cast<std::uint64_t>(x) + (kOne - kSqrtHalf);
  const double m = std::bit_cast<double>((shifted & 0x000fffffffffffffU) + kSqrtHalf);
  // The biased exponent becomes a double by planting it in the mantissa of 2^52: vector units convert no 64-bit integers.
  const double e = std::bit_cast<double>(0x4330000000000000U | (shifted >> 52U)) - (0x1p52 + 1023.0);
  const double z = (m - 1.0) / (m + 1.0);
  const double z2 = z * z;
  double series = 1.0 / 15.0;
  series = series * z2 + 1.0 / 13.0;
  series = series * z2 + 1.0 / 11.0;
  series = series * z2 + 1.0 / 9.0;
  series = series * z2 + 1.0 / 7.0;
  series = series * z2 + 1.0 / 5.0;
  series = series * z2 + 1.0 / 3.0;
  series = series * z2 + 1.0;
  return e * kLn2 + 2.0 * z * series;
}

double flip_sign(double value, std::uint64_t flip) { return std::bit_cast<double>(std::bit_cast<std::uint64_t>(value) ^ (flip << 63U)); }

/// Two independent standard normal values from two random words: r (cos t, sin t), r = sqrt(-2 log u) (Box & Muller 1958).
/// The upper two bits of `turn` choose t's quarter, the others its place in -pi/4 .. pi/4 around it, where Taylor's series are short.
void box_muller(std::uint32_t radius, std::uint32_t turn, float& first, float& second) {
  constexpr double kHalfPi = 0x1.921fb54442d18p+0;
  const double a = (open_unit(turn << 2U) - 0.5) * kHalfPi;
  const double a2 = a * a;
  double sine = 1.0 / 6227020800.0;  // 1/13!, and so on down
  sine = sine * a2 - 1.0 / 39916800.0;
  sine = sine * a2 + 1.0 / 362880.0;
  sine = sine * a2 - 1.0 / 5040.0;
  sine = sine * a2 + 1.0 / 120.0;
  sine = sine * a2 - 1.0 / 6.0;
  sine = (sine * a2 + 1.0) * a;
  double cosine = 1.0 / 479001600.0;  // 1/12!
  cosine = cosine * a2 - 1.0 / 3628800.0;
  cosine = cosine * a2 + 1.0 / 40320.0;
  cosine = cosine * a2 - 1.0 / 720.0;
  cosine = cosine * a2 + 1.0 / 24.0;
  cosine = cosine * a2 - 1.0 / 2.0;
  cosine = cosine * a2 + 1.0;

  const std::uint64_t quarter = turn >> 30U;
  const std::uint64_t swap = (quarter & 1U) * ~std::uint64_t{0};
  const auto cosine_bits = std::bit_cast<std::uint64_t>(cosine);
  const auto sine_bits = std::bit_cast<std::uint64_t>(sine);
  const std::uint64_t exchange = (cosine_bits ^ sine_bits) & swap;
  const double r = std::sqrt(-2.0 * log_series(open_unit(radius)));
  first = static_cast<float>(r * flip_sign(std::bit_cast<double>(cosine_bits ^ exchange), (quarter ^ (quarter >> 1U)) & 1U));
  second = static_cast<float>(r * flip_sign(std::bit_cast<double>(sine_bits ^ exchange), quarter >> 1U));
}

/// Values of kBlocks counters from `first_block` on. Word 2 of the counter is the tensor, so that all 64 bits of the key are the seed's.
void generate_pass(std::uint64_t seed, Tensor tensor, std::uint64_t first_block, std::array<float, kValuesPerPass>& values) {
  kernels::PhiloxWords<kBlocks> words;
  for (std::size_t n = 0; n < kBlocks; ++n) {
    const std::uint64_t block = first_block + n;
    words[0][n] = static_cast<std::uint32_t>(block);
    words[1][n] = static_cast<std::uint32_t>(block >> 32U);
    words[2][n] = static_cast<std::uint32_t>(tensor);
    words[3][n] = 0;
  }
  kernels::philox4x32_10(words, {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)});
  std::array<std::array<float, kBlocks>, 4> normals;
  for (std::size_t pair = 0; pair < 4; pair += 2) {  // one call of box_muller in the text: it is inlined, and the loop becomes vectors
    for (std::size_t n = 0; n < kBlocks; ++n) { box_muller(words[pair][n], words[pair + 1][n], normals[pair][n], normals[pair + 1][n]); }
  }
  for (std::size_t n = 0; n < kBlocks; ++n) {
    for (std::size_t word = 0; word < 4; ++word) { values[4 * n + word] = normals[word][n]; }
  }
}

class Generator final : public TensorSource {
 public:
  Generator(const Problem& problem, std::uint64_t seed, int threads) : problem_(problem), seed_(seed), threads_(threads) {
    validate(problem_);
    ANNULUS_EXPECTS(threads >= 1, "the generator needs at least 1 thread, found {}", threads);
    problem_.causal = false;
    problem_.scale = 1.0 / std::sqrt(static_cast<double>(problem_.head_dim));
  }

  const Problem& problem() const override { return problem_; }
  std::string describe() const override { return fmt::format("generator, seed {}", seed_); }
  std::string identity() const override { return describe(); }
  bool has_dout() const override { return true; }
  std::uint64_t fingerprint(Tensor /*tensor*/, std::int64_t part, std::int64_t /*parts*/) const override { return part == 0 ? seed_ : 0; }

  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    ANNULUS_EXPECTS(batch >= 0 && batch < problem_.batch && first >= 0 && count >= 0 && count <= rows_of(problem_, tensor) - first,
                    "rows {}..{} of batch entry {} are outside the problem of the {}", first, first + count, batch, describe());
    const std::int64_t row_elements = heads_of(problem_, tensor) * problem_.head_dim;
    const std::int64_t begin = (batch * rows_of(problem_, tensor) + first) * row_elements;
    const std::int64_t end = begin + count * row_elements;
    const std::int64_t first_pass = begin / kValuesPerPass;
    const std::int64_t end_pass = (end + kValuesPerPass - 1) / kValuesPerPass;
#pragma omp parallel for num_threads(threads_) schedule(static) if (end_pass - first_pass > kSerialPasses)
    for (std::int64_t pass = first_pass; pass < end_pass; ++pass) { read_pass(tensor, pass, begin, end, dtype, out); }
  }

 private:
  /// The values of pass number `pass` that lie in elements [begin, end) of the tensor, each to its place in `out`, where `begin` is first.
  void read_pass(Tensor tensor, std::int64_t pass, std::int64_t begin, std::int64_t end, DType dtype, void* out) const {
    std::array<float, kValuesPerPass> values;
    std::array<float, kValuesPerPass> held;
    const std::int64_t start = pass * kValuesPerPass;
    generate_pass(seed_, tensor, static_cast<std::uint64_t>(start / kValuesPerBlock), values);
    const std::int64_t from = std::max(begin, start);
    const std::int64_t elements = std::min(end, start + kValuesPerPass) - from;
    const void* source = values.data() + (from - start);
    DType source_dtype = DType::fp32;
    if (dtype != problem_.dtype) {  // what is read is the value that the source holds, as from a file of its dtype
      convert_elements(DType::fp32, source, problem_.dtype, held.data(), elements);
      source = held.data();
      source_dtype = problem_.dtype;
    }
    convert_elements(source_dtype, source, dtype, static_cast<std::byte*>(out) + (from - begin) * size_of(dtype), elements);
  }

  Problem problem_;
  std::uint64_t seed_;
  int threads_;
};

}  // namespace

std::unique_ptr<TensorSource> make_generator(const Problem& problem, std::uint64_t seed, int threads) {
  return std::make_unique<Generator>(problem, seed, threads);
}

}  // namespace annulus
