// SPDX-License-Identifier: Apache-2.0
// Products with weights and what is done to rows between them: the reference by hand, the cpu against the definition in fp64; gradients
// against central differences of that definition.
#include <annulus/kernels/layer.hpp>

#include <annulus/kernels/layer_gradients.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <numbers>
#include <random>
#include <vector>

namespace annulus::kernels {
namespace {

using Values = std::vector<double>;

/// Elements of a dtype.
class Elements {
 public:
  Elements(DType dtype, const Values& values) : dtype_(dtype), bytes_(values.size() * static_cast<std::size_t>(size_of(dtype))) {
    with_element(dtype, [&](auto tag) {
      using Element = decltype(tag);
      for (std::size_t i = 0; i < values.size(); ++i) {
        const auto element = from_float<Element>(static_cast<float>(values[i]));
        std::memcpy(bytes_.data() + i * sizeof(Element), &element, sizeof(Element));
      }
    });
  }
  Elements(DType dtype, std::int64_t count) : Elements(dtype, Values(static_cast<std::size_t>(count), 0.5)) {}
  void* data() { return bytes_.data(); }
  bool operator==(const Elements&) const = default;

  Values values() const {
    Values values(bytes_.size() / static_cast<std::size_t>(size_of(dtype_)));
    with_element(dtype_, [&](auto tag) {
      using Element = decltype(tag);
      for (std::size_t i = 0; i < values.size(); ++i) {
        Element element{};
        std::memcpy(&element, bytes_.data() + i * sizeof(Element), sizeof(Element));
        values[i] = static_cast<double>(to_float(element));
      }
    });
    return values;
  }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

Values normal(std::int64_t count, std::uint32_t seed, double scale = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> distribution;
  Values values(static_cast<std::size_t>(count));
  for (double& value : values) { value = scale * distribution(engine); }
  return values;
}

std::vector<float> floats(const Values& values) { return {values.begin(), values.end()}; }

double root_mean_square(const Values& values, const Values& from) {
  double squares = 0;
  for (std::size_t i = 0; i < values.size(); ++i) { squares += (values[i] - from[i]) * (values[i] - from[i]); }
  return std::sqrt(squares / static_cast<double>(values.size()));
}

void linear_on_cpu(const LinearTask& task, int threads) {
  constexpr std::align_val_t kLine{64};
  void* workspace = ::operator new(static_cast<std::size_t>(cpu::linear_workspace_bytes(threads)), kLine);
  cpu::linear(task, threads, workspace);
  ::operator delete(workspace, kLine);
}

void linear_gradient_on_cpu(const LinearGradientTask& task, int threads) {
  constexpr std::align_val_t kLine{64};
  void* workspace = ::operator new(static_cast<std::size_t>(cpu::linear_gradient_workspace_bytes(task, threads)), kLine);
  cpu::linear_gradient(task, threads, workspace);
  ::operator delete(workspace, kLine);
}

/// Multiples of 2^-12: adding a step of 2^-8 to one, as a float, is exact.
std::vector<float> on_grid(const Values& values) {
  std::vector<float> rounded;
  for (const double value : values) { rounded.push_back(static_cast<float>(std::round(value * 4096) / 4096)); }
  return rounded;
}

/// TransformTask by its definition, on operands that are given apart so that each test says what it has.
Values transformed(const TransformTask& task, const Values& in) {
  Values out = in;
  const auto features = static_cast<std::size_t>(task.features);
  const auto at = [](const float* values, std::size_t i, double otherwise) {
    return values == nullptr ? otherwise : static_cast<double>(values[i]);
  };
  for (std::size_t row = 0; row < static_cast<std::size_t>(task.rows); ++row) {
    double* x = out.data() + row * features;
    for (std::size_t i = 0; i < features; ++i) { x[i] += at(task.bias, i, 0); }
    if (task.norm != Norm::none) {
      const auto count = static_cast<std::size_t>(task.norm_features);
      for (std::size_t first = 0; first < features; first += count) {
        double sum = 0;
        double squares = 0;
        for (std::size_t i = 0; i < count; ++i) {
          sum += x[first + i];
          squares += x[first + i] * x[first + i];
        }
        const double mean = task.norm == Norm::layer ? sum / static_cast<double>(count) : 0;
        const double deviation = std::sqrt(squares / static_cast<double>(count) - mean * mean + task.norm_epsilon);
        for (std::size_t i = 0; i < count; ++i) {
          x[first + i] = (x[first + i] - mean) / deviation * at(task.norm_weight, i, 1) + at(task.norm_bias, i, 0);
        }
      }
    }
    if (task.rotary != RotaryPairs::none) {
      const auto head_dim = static_cast<std::size_t>(task.head_dim);
      for (std::size_t first = 0; first < features; first += head_dim) {
        for (std::size_t pair = 0; pair < head_dim / 2; ++pair) {
          const bool half = task.rotary == RotaryPairs::half;
          double& a = x[first + (half ? pair : 2 * pair)];
          double& b = x[first + (half ? pair + head_dim / 2 : 2 * pair + 1)];
          const double exponent = -2.0 * static_cast<double>(pair) / static_cast<double>(head_dim);
          const auto position = static_cast<double>(task.first_position + static_cast<std::int64_t>(row));
          const std::complex<double> turned = std::complex(a, b) * std::polar(1.0, position * std::pow(task.rotary_base, exponent));
          a = turned.real();
          b = turned.imag();
        }
      }
    }
    for (std::size_t i = 0; i < features && task.gate != Gate::none; ++i) {
      const double z = (static_cast<double>(task.gate_in[row * features + i]) + at(task.gate_bias, i, 0)) / task.gate_temperature;
      if (task.gate == Gate::sigmoid) { x[i] *= 1 / (1 + std::exp(-z)); }
      if (task.gate == Gate::tanh) { x[i] *= std::tanh(z); }
      if (task.gate == Gate::relu) { x[i] *= std::max(z, 0.0); }
      if (task.gate == Gate::gelu) { x[i] *= z * (1 + std::erf(z / std::numbers::sqrt2)) / 2; }
    }
  }
  return out;
}

/// What transform_rows_gradient() gives: of each row, and sums over rows.
struct TransformGradients {
  std::vector<float> din;
  std::vector<float> dgate_in;
  Values dbias;
  Values dnorm_weight;
  Values dnorm_bias;
  Values dgate_bias;

  explicit TransformGradients(const TransformTask& task)
      : din(static_cast<std::size_t>(task.rows * task.features)),
        dgate_in(din.size()),
        dbias(static_cast<std::size_t>(task.features)),
        dnorm_weight(static_cast<std::size_t>(task.norm_features)),
        dnorm_bias(dnorm_weight.size()),
        dgate_bias(dbias.size()) {}
  TransformGradientTask task(const TransformTask& forward, const float* dout) {
    return {forward, dout, din.data(), dgate_in.data(), dbias.data(), dnorm_weight.data(), dnorm_bias.data(), dgate_bias.data()};
  }
  bool operator==(const TransformGradients&) const = default;
};

/// d sum(dout * out) / dp of row `row`, or of all rows if that is -1, by central differences of fourth order. `moved` is the result with
/// p moved by so much.
template <class Moved>
double difference(const TransformTask& task, const std::vector<float>& dout, std::int64_t row, const Moved& moved) {
  constexpr double kStep = 0x1p-8;
  const auto features = static_cast<std::size_t>(task.features);
  const std::size_t first = row < 0 ? 0 : static_cast<std::size_t>(row) * features;
  const std::size_t end = row < 0 ? dout.size() : first + features;
  const auto loss = [&](const Values& out) {
    double sum = 0;
    for (std::size_t i = first; i < end; ++i) { sum += static_cast<double>(dout[i]) * out[i]; }
    return sum;
  };
  return (8 * (loss(moved(kStep)) - loss(moved(-kStep))) - (loss(moved(2 * kStep)) - loss(moved(-2 * kStep)))) / (12 * kStep);
}

double largest_of(const Values& values) {
  double largest = 0;
  for (const double value : values) { largest = std::max(largest, std::abs(value)); }
  return largest;
}

Values doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }

void check_near(const Values& found, const Values& expected, double relative) {
  REQUIRE(found.size() == expected.size());
  const double largest = std::max(largest_of(expected), 1.0);
  for (std::size_t i = 0; i < found.size(); ++i) { CHECK(std::abs(found[i] - expected[i]) <= relative * largest); }
}

}  // namespace

TEST_CASE("linear multiplies rows with weights that lie [in, out]") {
  std::vector<float> in{1, 2, 3, 4, 5, 6};                 // 2 rows of 3
  std::vector<float> weight{1, 0, 10, 0, 1, 20, 1, 1, 0};  // 3 by 3
  std::vector<float> out(6);
  const LinearTask task{DType::fp32, DType::fp32, 2, 3, 3, in.data(), weight.data(), out.data()};

  reference::linear(task);
  CHECK(out == std::vector<float>{4, 5, 50, 10, 11, 140});

  std::fill(out.begin(), out.end(), 0.0F);
  linear_on_cpu(task, 1);
  CHECK(out == std::vector<float>{4, 5, 50, 10, 11, 140});
}

TEST_CASE("transform_rows does what hand-computed rows say") {
  std::vector<float> in{1, 3, 5, 7};
  std::vector<float> out(4);
  TransformTask task;
  task.rows = 1;
  task.features = 4;
  task.in = in.data();
  task.out = out.data();

  SECTION("nothing") { reference::transform_rows(task); }
  SECTION("bias") {
    const std::vector<float> bias{1, 2, 3, 4};
    task.bias = bias.data();
    reference::transform_rows(task);
    CHECK(out == std::vector<float>{2, 5, 8, 11});
    return;
  }
  SECTION("layer norm of heads") {
    const std::vector<float> weight{2, 1};
    const std::vector<float> bias{0, 10};
    task.norm = Norm::layer;
    task.norm_features = 2;
    task.norm_weight = weight.data();
    task.norm_bias = bias.data();
    task.norm_epsilon = 3;  // 1 + 3 is a square
    reference::transform_rows(task);
    CHECK(out == std::vector<float>{-1, 10.5, -1, 10.5});
    return;
  }
  SECTION("rms norm of the row") {
    task.norm = Norm::rms;
    task.norm_features = 4;
    task.norm_epsilon = 4;  // 84 / 4 + 4 is a square
    reference::transform_rows(task);
    CHECK(out == std::vector<float>{0.2F, 0.6F, 1.0F, 1.4F});
    return;
  }
  SECTION("a quarter turn of pair 0, and of pair 1 one that is smaller by the base") {
    task.head_dim = 4;
    task.rotary_base = 4;  // pair 1 turns by half of what pair 0 does
    task.first_position = 1;
    task.rotary = GENERATE(RotaryPairs::neighbouring, RotaryPairs::half);
    reference::transform_rows(task);
    const double c = std::cos(1.0), s = std::sin(1.0), c2 = std::cos(0.5), s2 = std::sin(0.5);
    const Values expected = task.rotary == RotaryPairs::neighbouring ? Values{c - 3 * s, s + 3 * c, 5 * c2 - 7 * s2, 5 * s2 + 7 * c2}
                                                                     : Values{c - 5 * s, 3 * c2 - 7 * s2, s + 5 * c, 3 * s2 + 7 * c2};
    for (std::size_t i = 0; i < 4; ++i) { CHECK(std::abs(static_cast<double>(out[i]) - expected[i]) < 1e-6); }
    return;
  }
  SECTION("a gate of relu with a bias and a temperature") {
    const std::vector<float> gate{-3, 0, 1, 5};
    const std::vector<float> bias{1, 1, 1, 1};
    task.gate = Gate::relu;
    task.gate_in = gate.data();
    task.gate_bias = bias.data();
    task.gate_temperature = 2;
    reference::transform_rows(task);
    CHECK(out == std::vector<float>{0, 1.5, 5, 21});
    return;
  }
  CHECK(out == in);
}

TEST_CASE("linear on the cpu is as near to fp64 as a plain product, whatever its shape, and the same for any threads and neighbours") {
  const DType dtype = GENERATE(DType::fp32, DType::fp16, DType::bf16);
  struct Shape {
    std::int64_t rows, in, out;
  };
  const Shape shape = GENERATE(Shape{1, 1, 1}, Shape{3, 130, 17}, Shape{65, 128, 128}, Shape{300, 257, 261}, Shape{257, 96, 400});
  Elements in(dtype, normal(shape.rows * shape.in, 1));
  Elements weight(dtype, normal(shape.in * shape.out, 2, 1 / std::sqrt(static_cast<double>(shape.in))));
  Elements out(DType::fp32, shape.rows * shape.out);
  LinearTask task{dtype, DType::fp32, shape.rows, shape.in, shape.out, in.data(), weight.data(), out.data()};
  const Values x = in.values();
  const Values w = weight.values();
  Values exact(static_cast<std::size_t>(shape.rows * shape.out));
  Values plain(exact.size());
  for (std::size_t at = 0; at < exact.size(); ++at) {
    const std::size_t row = at / static_cast<std::size_t>(shape.out);
    const std::size_t column = at % static_cast<std::size_t>(shape.out);
    float sum = 0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(shape.in); ++i) {
      const double a = x[row * static_cast<std::size_t>(shape.in) + i];
      const double b = w[i * static_cast<std::size_t>(shape.out) + column];
      exact[at] += a * b;
      sum += static_cast<float>(a) * static_cast<float>(b);
    }
    plain[at] = static_cast<double>(sum);
  }
  INFO("rows " << shape.rows << ", in " << shape.in << ", out " << shape.out);

  linear_on_cpu(task, 1);

  CHECK(root_mean_square(out.values(), exact) <= 1.1 * root_mean_square(plain, exact) + 1e-9);
  Elements by_three(DType::fp32, shape.rows * shape.out);
  task.out = by_three.data();
  linear_on_cpu(task, 3);
  CHECK(by_three == out);
  Elements alone(DType::fp32, shape.out);
  task.in = static_cast<std::byte*>(in.data()) + (shape.rows - 1) * shape.in * size_of(dtype);
  task.rows = 1;
  task.out = alone.data();
  linear_on_cpu(task, 1);
  CHECK(std::memcmp(alone.data(), static_cast<float*>(out.data()) + (shape.rows - 1) * shape.out,
                    static_cast<std::size_t>(shape.out) * sizeof(float)) == 0);
  Elements narrow(dtype, shape.rows * shape.out);
  task = {dtype, dtype, shape.rows, shape.in, shape.out, in.data(), weight.data(), narrow.data()};
  linear_on_cpu(task, 2);
  CHECK(narrow == Elements(dtype, out.values()));
}

TEST_CASE("transform_rows is its definition in every combination, on the cpu within fp32 and in the reference rounded once") {
  const DType in_dtype = GENERATE(DType::fp32, DType::bf16);
  const DType out_dtype = GENERATE(DType::fp32, DType::fp16);
  const Norm norm = GENERATE(Norm::none, Norm::layer, Norm::rms);
  const RotaryPairs rotary = GENERATE(RotaryPairs::none, RotaryPairs::neighbouring, RotaryPairs::half);
  const Gate gate = GENERATE(Gate::none, Gate::sigmoid, Gate::tanh, Gate::relu, Gate::gelu);
  constexpr std::int64_t kRows = 5;
  constexpr std::int64_t kFeatures = 42;
  const bool of_heads = GENERATE(false, true);
  Elements in(in_dtype, normal(kRows * kFeatures, 3));
  const std::vector<float> bias = floats(normal(kFeatures, 4));
  const std::vector<float> norm_weight = floats(normal(kFeatures, 5));
  const std::vector<float> norm_bias = floats(normal(kFeatures, 6));
  const std::vector<float> gate_in = floats(normal(kRows * kFeatures, 7, 3));
  const std::vector<float> gate_bias = floats(normal(kFeatures, 8));
  TransformTask task;
  task.rows = kRows;
  task.features = kFeatures;
  task.in_dtype = in_dtype;
  task.out_dtype = out_dtype;
  task.in = in.data();
  task.bias = of_heads ? bias.data() : nullptr;
  task.norm = norm;
  task.norm_features = of_heads ? 14 : kFeatures;
  task.norm_weight = norm_weight.data();
  task.norm_bias = of_heads ? nullptr : norm_bias.data();
  task.norm_epsilon = 1e-5;
  task.rotary = rotary;
  task.head_dim = 14;
  task.rotary_base = 10000;
  task.first_position = 1'000'003;  // an angle that fp32 does not hold
  task.gate = gate;
  task.gate_in = gate_in.data();
  task.gate_bias = of_heads ? nullptr : gate_bias.data();
  task.gate_temperature = 0.7;
  const Values exact = transformed(task, in.values());
  double largest = 0;
  for (const double value : exact) { largest = std::max(largest, std::abs(value)); }

  Elements by_reference(out_dtype, kRows * kFeatures);
  task.out = by_reference.data();
  reference::transform_rows(task);
  Elements by_cpu(out_dtype, kRows * kFeatures);
  task.out = by_cpu.data();
  cpu::transform_rows(task, 2);

  const double step = out_dtype == DType::fp32 ? 0x1p-24 : 0x1p-11;  // half a unit of the last place
  const Values from_reference = by_reference.values();
  const Values from_cpu = by_cpu.values();
  for (std::size_t i = 0; i < exact.size(); ++i) {
    CHECK(std::abs(from_reference[i] - exact[i]) <= step * 1.001 * std::abs(exact[i]) + 1e-7);
    CHECK(std::abs(from_cpu[i] - exact[i]) <= step * 1.001 * std::abs(exact[i]) + 8 * 0x1p-24 * largest);
  }
}

TEST_CASE("a NaN of one row stays in that row, and a gate keeps one") {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> in{1, 2, kNan, 4, 5, 6};
  std::vector<float> weight{1, 1, 1, 1};
  std::vector<float> out(6);
  linear_on_cpu({DType::fp32, DType::fp32, 3, 2, 2, in.data(), weight.data(), out.data()}, 1);
  CHECK((out[0] == 3 && std::isnan(out[2]) && std::isnan(out[3]) && out[4] == 11));

  const Gate gate = GENERATE(Gate::sigmoid, Gate::tanh, Gate::relu, Gate::gelu);
  const std::vector<float> ones(6, 1.0F);
  TransformTask task;
  task.rows = 3;
  task.features = 2;
  task.in = ones.data();
  task.out = out.data();
  task.gate = gate;
  task.gate_in = in.data();
  cpu::transform_rows(task, 1);
  CHECK((std::isfinite(out[1]) && std::isnan(out[2]) && std::isfinite(out[3])));
}

TEST_CASE("linear_gradient adds what hand-computed rows say, and nothing of no rows") {
  const std::vector<float> in{1, 2, 3, 4};                // 2 rows of 2
  const std::vector<float> weight{1, 0, 2, 0, 1, 3};      // 2 by 3
  const std::vector<float> dout{1, 10, 100, 2, 20, 200};  // 2 rows of 3
  std::vector<float> din{1, 1, 1, 1};
  Values dweight{1, 1, 1, 1, 1, 1};
  const bool by_cpu = GENERATE(false, true);
  LinearGradientTask task{DType::fp32, 2, 2, 3, in.data(), weight.data(), dout.data(), din.data(), dweight.data()};
  const auto differentiate = [&] {
    if (by_cpu) {
      linear_gradient_on_cpu(task, 2);
    } else {
      reference::linear_gradient(task);
    }
  };

  differentiate();
  CHECK(din == std::vector<float>{202, 311, 403, 621});
  CHECK(dweight == Values{8, 71, 701, 11, 101, 1001});

  task.rows = 0;
  differentiate();
  CHECK(din == std::vector<float>{202, 311, 403, 621});
  CHECK(dweight == Values{8, 71, 701, 11, 101, 1001});
}

TEST_CASE("linear_gradient on the cpu is as near to fp64 as a plain product, whatever its shape, and the same for any threads") {
  const DType dtype = GENERATE(DType::fp32, DType::bf16);
  struct Shape {
    std::int64_t rows, in, out;
  };
  const Shape shape = GENERATE(Shape{1, 1, 1}, Shape{3, 130, 17}, Shape{65, 128, 128}, Shape{300, 57, 261});
  INFO("rows " << shape.rows << ", in " << shape.in << ", out " << shape.out);
  Elements in(dtype, normal(shape.rows * shape.in, 11));
  Elements weight(dtype, normal(shape.in * shape.out, 12));
  const std::vector<float> dout = floats(normal(shape.rows * shape.out, 13));
  struct Result {
    std::vector<float> din;
    Values dweight;
  };
  const auto differentiate = [&](int threads) {  // 0: the reference
    Result result{std::vector<float>(static_cast<std::size_t>(shape.rows * shape.in)),
                  Values(static_cast<std::size_t>(shape.in * shape.out))};
    const LinearGradientTask task{
        dtype, shape.rows, shape.in, shape.out, in.data(), weight.data(), dout.data(), result.din.data(), result.dweight.data()};
    if (threads == 0) {
      reference::linear_gradient(task);
    } else {
      linear_gradient_on_cpu(task, threads);
    }
    return result;
  };
  const Values x = in.values();
  const Values w = weight.values();
  const auto rows = static_cast<std::size_t>(shape.rows);
  const auto ins = static_cast<std::size_t>(shape.in);
  const auto outs = static_cast<std::size_t>(shape.out);
  Values din(rows * ins), plain_din(rows * ins), dweight(ins * outs), plain_dweight(ins * outs);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t i = 0; i < ins; ++i) {
      float sum = 0;
      for (std::size_t j = 0; j < outs; ++j) {
        din[row * ins + i] += static_cast<double>(dout[row * outs + j]) * w[i * outs + j];
        sum += dout[row * outs + j] * static_cast<float>(w[i * outs + j]);
      }
      plain_din[row * ins + i] = static_cast<double>(sum);
    }
  }
  for (std::size_t i = 0; i < ins; ++i) {
    for (std::size_t j = 0; j < outs; ++j) {
      float sum = 0;
      for (std::size_t row = 0; row < rows; ++row) {
        dweight[i * outs + j] += x[row * ins + i] * static_cast<double>(dout[row * outs + j]);
        sum += static_cast<float>(x[row * ins + i]) * dout[row * outs + j];
      }
      plain_dweight[i * outs + j] = static_cast<double>(sum);
    }
  }

  const Result by_reference = differentiate(0);
  const Result by_one = differentiate(1);
  const Result by_three = differentiate(3);

  check_near(doubles(by_reference.din), din, 0x1p-24);
  check_near(by_reference.dweight, dweight, 1e-14);
  CHECK(root_mean_square(doubles(by_one.din), din) <= 1.1 * root_mean_square(plain_din, din) + 1e-9);
  CHECK(root_mean_square(by_one.dweight, dweight) <= 1.1 * root_mean_square(plain_dweight, dweight) + 1e-9);
  CHECK((by_three.din == by_one.din && by_three.dweight == by_one.dweight));
}

TEST_CASE("transform_rows_gradient is the central difference of the definition in every combination") {
  const Norm norm = GENERATE(Norm::none, Norm::layer, Norm::rms);
  const RotaryPairs rotary = GENERATE(RotaryPairs::none, RotaryPairs::neighbouring, RotaryPairs::half);
  const Gate gate = GENERATE(Gate::none, Gate::sigmoid, Gate::tanh, Gate::relu, Gate::gelu);
  const bool of_heads = GENERATE(false, true);
  constexpr std::int64_t kRows = 3;
  constexpr std::int64_t kFeatures = 12;
  const DType in_dtype = of_heads ? DType::bf16 : DType::fp32;
  Elements in(in_dtype, normal(kRows * kFeatures, 21));
  std::vector<float> bias = on_grid(normal(kFeatures, 22));
  std::vector<float> norm_weight = on_grid(normal(kFeatures, 23));
  std::vector<float> norm_bias = on_grid(normal(kFeatures, 24));
  std::vector<float> gate_bias = on_grid(normal(kFeatures, 25));
  std::vector<float> gate_in = on_grid(normal(kRows * kFeatures, 26, 3));
  const bool has_gate_bias = !of_heads;
  for (std::size_t i = 0; i < gate_in.size(); ++i) {
    // relu has no derivative at 0, and differences near it are none.
    const float moved_by = has_gate_bias ? gate_bias[i % kFeatures] : 0.0F;
    if (std::abs(gate_in[i] + moved_by) < 0.0625F) { gate_in[i] += 0.25F; }
  }
  const std::vector<float> dout = floats(normal(kRows * kFeatures, 27));
  TransformTask task;
  task.rows = kRows;
  task.features = kFeatures;
  task.in_dtype = in_dtype;
  task.in = in.data();
  task.bias = of_heads ? bias.data() : nullptr;
  task.norm = norm;
  task.norm_features = of_heads ? 6 : kFeatures;
  task.norm_weight = norm_weight.data();
  task.norm_bias = norm_bias.data();
  task.norm_epsilon = 0.5;  // not hidden by the variance
  task.rotary = rotary;
  task.head_dim = 6;
  task.rotary_base = 10000;
  task.first_position = 1'000'003;
  task.gate = gate;
  task.gate_in = gate_in.data();
  task.gate_bias = has_gate_bias ? gate_bias.data() : nullptr;
  task.gate_temperature = 0.7;
  const auto features = static_cast<std::size_t>(kFeatures);
  const auto rows = static_cast<std::size_t>(kRows);
  const auto of_rows = [&](const auto& moved) {
    Values differences(rows * features);
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t i = 0; i < features; ++i) {
        differences[row * features + i] =
            difference(task, dout, static_cast<std::int64_t>(row), [&](double by) { return moved(row * features + i, by); });
      }
    }
    return differences;
  };
  const auto of_sums = [&](std::vector<float>& parameter, std::int64_t count) {
    Values differences;
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
      differences.push_back(difference(task, dout, -1, [&](double by) {
        const float before = parameter[i];
        parameter[i] += static_cast<float>(by);
        const Values out = transformed(task, in.values());
        parameter[i] = before;
        return out;
      }));
    }
    return differences;
  };
  const Values din = of_rows([&](std::size_t at, double by) {
    Values moved = in.values();
    moved[at] += by;
    return transformed(task, moved);
  });
  INFO("norm " << static_cast<int>(norm) << ", rotary " << static_cast<int>(rotary) << ", gate " << static_cast<int>(gate));

  TransformGradients by_reference(task);
  reference::transform_rows_gradient(by_reference.task(task, dout.data()));
  TransformGradients by_cpu(task);
  cpu::transform_rows_gradient(by_cpu.task(task, dout.data()), 2);

  constexpr double kDifference = 1e-6;     // of the step: 2^-32 / 30 times a fifth derivative
  constexpr double kPlain = 32 * 0x1p-24;  // a few roundings of fp32, of a norm, a rotation and a gate
  check_near(doubles(by_reference.din), din, kDifference);
  check_near(doubles(by_cpu.din), doubles(by_reference.din), kPlain);
  if (of_heads) {
    check_near(by_reference.dbias, of_sums(bias, kFeatures), kDifference);
    check_near(by_cpu.dbias, by_reference.dbias, kPlain);
  }
  if (norm != Norm::none) {
    check_near(by_reference.dnorm_weight, of_sums(norm_weight, task.norm_features), kDifference);
    check_near(by_reference.dnorm_bias, of_sums(norm_bias, task.norm_features), kDifference);
    check_near(by_cpu.dnorm_weight, by_reference.dnorm_weight, kPlain);
    check_near(by_cpu.dnorm_bias, by_reference.dnorm_bias, kPlain);
  }
  if (gate != Gate::none) {
    const Values dgate_in = of_rows([&](std::size_t at, double by) {
      const float before = gate_in[at];
      gate_in[at] += static_cast<float>(by);
      Values out = transformed(task, in.values());
      gate_in[at] = before;
      return out;
    });
    check_near(doubles(by_reference.dgate_in), dgate_in, kDifference);
    check_near(doubles(by_cpu.dgate_in), doubles(by_reference.dgate_in), kPlain);
    if (has_gate_bias) {
      check_near(by_reference.dgate_bias, of_sums(gate_bias, kFeatures), kDifference);
      check_near(by_cpu.dgate_bias, by_reference.dgate_bias, kPlain);
    }
  }
}

TEST_CASE("transform_rows_gradient on the cpu has the same bits for any threads, adds to sums and may write over dout") {
  constexpr std::int64_t kRows = 205;
  constexpr std::int64_t kFeatures = 42;
  const std::vector<float> in = floats(normal(kRows * kFeatures, 31));
  const std::vector<float> gate_in = floats(normal(kRows * kFeatures, 32));
  const std::vector<float> dout = floats(normal(kRows * kFeatures, 33));
  TransformTask task;
  task.rows = kRows;
  task.features = kFeatures;
  task.in = in.data();
  task.norm = Norm::layer;
  task.norm_features = 14;
  task.norm_epsilon = 1e-5;
  task.rotary = RotaryPairs::half;
  task.head_dim = 14;
  task.rotary_base = 10000;
  task.gate = Gate::gelu;
  task.gate_in = gate_in.data();

  TransformGradients by_one(task);
  cpu::transform_rows_gradient(by_one.task(task, dout.data()), 1);
  TransformGradients by_five(task);
  cpu::transform_rows_gradient(by_five.task(task, dout.data()), 5);
  TransformGradients twice(task);
  cpu::transform_rows_gradient(twice.task(task, dout.data()), 3);
  twice.din = dout;
  cpu::transform_rows_gradient(twice.task(task, twice.din.data()), 3);

  CHECK(by_five == by_one);
  CHECK(twice.din == by_one.din);
  Values doubled = by_one.dnorm_weight;
  for (double& value : doubled) { value *= 2; }
  check_near(twice.dnorm_weight, doubled, 1e-13);
}

TEST_CASE("a gate's slope keeps a NaN, and is finite far from zero") {
  const Gate gate = GENERATE(Gate::sigmoid, Gate::tanh, Gate::relu, Gate::gelu);
  const std::vector<float> gate_in{std::numeric_limits<float>::quiet_NaN(), 1000, -1000};
  const std::vector<float> ones(3, 1.0F);
  TransformTask task;
  task.rows = 1;
  task.features = 3;
  task.in = ones.data();
  task.gate = gate;
  task.gate_in = gate_in.data();
  const bool onwards = gate == Gate::relu || gate == Gate::gelu;

  TransformGradients gradients(task);
  cpu::transform_rows_gradient(gradients.task(task, ones.data()), 1);

  CHECK(std::isnan(gradients.dgate_in[0]));
  CHECK((gradients.dgate_in[1] == (onwards ? 1.0F : 0.0F) && gradients.dgate_in[2] == 0.0F));
}

}  // namespace annulus::kernels
