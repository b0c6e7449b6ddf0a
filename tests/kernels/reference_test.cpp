// SPDX-License-Identifier: Apache-2.0
// The reference kernels against numbers worked out by hand, on five tokens or fewer.
#include <annulus/kernels/reference.hpp>

#include <annulus_test.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace annulus::kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool is_near(double value, double expected, double relative) { return std::abs(value - expected) <= relative * std::abs(expected); }

/// One head of head_dim numbers; q [q_rows], k and v [k_rows], partials of q_rows rows.
struct OneHead {
  OneHead(std::vector<float> q_values, std::vector<float> k_values, std::vector<float> v_values, std::int64_t dim)
      : q(std::move(q_values)), k(std::move(k_values)), v(std::move(v_values)), head_dim(dim) {
    acc.resize(q.size());
    max.resize(q.size() / static_cast<std::size_t>(dim));
    sum.resize(max.size());
    reference::fill_identity(partial(), q_rows(), dim);
  }
  std::int64_t q_rows() const { return static_cast<std::int64_t>(q.size()) / head_dim; }
  std::int64_t k_rows() const { return static_cast<std::int64_t>(k.size()) / head_dim; }
  PartialPointers partial() { return {acc.data(), max.data(), sum.data()}; }

  AttendTask task(double scale) {
    AttendTask task;
    task.batch = task.segments = task.kv_heads = task.q_per_kv = 1;
    task.q_rows = q_rows();
    task.k_rows = k_rows();
    task.head_dim = head_dim;
    task.scale = scale;
    task.q = q.data();
    task.k = k.data();
    task.v = v.data();
    task.acc = acc.data();
    task.max = max.data();
    task.sum = sum.data();
    task.q_strides.row = task.kv_strides.row = task.acc_strides.row = head_dim;
    task.stat_strides.row = 1;
    return task;
  }

  std::vector<float> q;
  std::vector<float> k;
  std::vector<float> v;
  std::int64_t head_dim;
  std::vector<double> acc;
  std::vector<double> max;
  std::vector<double> sum;
};

/// finish() of partials of `rows` rows of one number.
struct Finished {
  std::vector<float> out;
  std::vector<float> lse;
};
Finished finish(std::vector<PartialPointers> partials, std::int64_t rows, Combine combine, double output_scale = 1.0, int extra = -1) {
  Finished result{std::vector<float>(static_cast<std::size_t>(rows)), std::vector<float>(static_cast<std::size_t>(rows))};
  FinishTask task;
  task.combine = combine;
  task.batch = task.heads = task.head_dim = 1;
  task.rows = rows;
  task.output_scale = output_scale;
  task.partials = static_cast<int>(partials.size());
  task.extra = extra;
  for (std::size_t g = 0; g < partials.size(); ++g) { task.partial[g] = partials[g]; }
  task.out = result.out.data();
  task.lse = result.lse.data();
  reference::finish(task);
  return result;
}

/// A partial of one row of one number.
struct OneNumber {
  double acc = 0.0;
  double max = -kInfinity;
  double sum = 0.0;
  PartialPointers pointers() { return {&acc, &max, &sum}; }
};

TEST_CASE("reference attend weighs two keys by the exponentials of their scores", "[kernels]") {
  // Scores 0 and ln 3 give weights 1/4 and 3/4.
  OneHead head({1.0F}, {0.0F, std::log(3.0F)}, {8.0F, 16.0F}, 1);

  reference::attend(head.task(1.0));

  CHECK(is_near(head.max[0], std::log(3.0), 1e-7));
  CHECK(is_near(head.sum[0], 4.0 / 3.0, 1e-7));
  CHECK(is_near(head.acc[0] / head.sum[0], 14.0, 1e-7));
}

TEST_CASE("reference attend gives the mean of the values when the scale is zero", "[kernels]") {
  OneHead head({5.0F, -3.0F}, {1.0F, 2.0F, 3.0F, 4.0F, 9.0F, 9.0F, 0.0F, 1.0F}, {1.0F, 10.0F, 2.0F, 20.0F, 3.0F, 30.0F, 6.0F, 60.0F}, 2);

  reference::attend(head.task(0.0));

  CHECK(head.max[0] == 0.0);
  CHECK(head.sum[0] == 4.0);
  CHECK(head.acc[0] == 12.0);
  CHECK(head.acc[1] == 120.0);
}

TEST_CASE("reference attend returns a constant value whatever the scores are", "[kernels]") {
  OneHead head({1.0F}, {-7.0F, 0.5F, 3.0F, 100.0F, -200.0F}, {2.5F, 2.5F, 2.5F, 2.5F, 2.5F}, 1);

  reference::attend(head.task(1.0));

  CHECK(head.acc[0] == 2.5 * head.sum[0]);
}

TEST_CASE("reference attend under a causal mask sees keys up to the query's own position", "[kernels]") {
  // Positions: queries 1, 3; keys 2, 3, 4. The first query sees none, the second sees keys 2 and 3.
  OneHead head({1.0F, 1.0F}, {0.0F, 0.0F, 0.0F}, {1.0F, 5.0F, 1000.0F}, 1);
  AttendTask task = head.task(1.0);
  task.mask = Mask::causal;
  task.q_positions = {1, 2};
  task.k_positions = {2, 1};

  reference::attend(task);

  CHECK(head.max == std::vector<double>{-kInfinity, 0.0});
  CHECK(head.sum == std::vector<double>{0.0, 2.0});
  CHECK(head.acc == std::vector<double>{0.0, 6.0});
}

TEST_CASE("reference attend with one visible key returns its value exactly", "[kernels]") {
  OneHead head({3.0F}, {2.0F, -1.0F}, {0.3F, 77.0F}, 1);
  AttendTask task = head.task(1.0);
  task.mask = Mask::causal;
  task.q_positions = {0, 1};

  reference::attend(task);

  CHECK(head.max[0] == 6.0);
  CHECK(head.sum[0] == 1.0);
  CHECK(head.acc[0] == static_cast<double>(0.3F));
}

TEST_CASE("reference attend in two chunks is the attend of all keys", "[kernels]") {
  // The second chunk raises the maximum from 1 to 2: what was summed so far shrinks by exp(-1).
  OneHead head({1.0F}, {1.0F, 2.0F}, {10.0F, 20.0F}, 1);
  AttendTask first = head.task(1.0);
  first.k_rows = 1;
  AttendTask second = first;
  second.k = head.k.data() + 1;
  second.v = head.v.data() + 1;

  reference::attend(first);
  reference::attend(second);

  CHECK(head.max[0] == 2.0);
  CHECK(is_near(head.sum[0], 1.0 + std::exp(-1.0), 1e-15));
  CHECK(is_near(head.acc[0], 20.0 + 10.0 * std::exp(-1.0), 1e-15));
}

TEST_CASE("reference attend pairs query heads with their KV head and segments with their own keys", "[kernels]") {
  // Batch 1, 2 segments of 1 row, 2 KV heads with 2 query heads each; V is the only thing that differs: 1..4 for (segment, kv head).
  std::vector<float> q(8, 1.0F);
  std::vector<float> k(4, 1.0F);
  std::vector<float> v{1.0F, 2.0F, 3.0F, 4.0F};
  std::vector<double> acc(8);
  std::vector<double> max(8);
  std::vector<double> sum(8);
  reference::fill_identity({acc.data(), max.data(), sum.data()}, 8, 1);
  AttendTask task;
  task.batch = task.q_rows = task.k_rows = task.head_dim = 1;
  task.segments = task.kv_heads = task.q_per_kv = 2;
  task.q = q.data();
  task.k = k.data();
  task.v = v.data();
  task.acc = acc.data();
  task.max = max.data();
  task.sum = sum.data();
  task.q_strides = task.acc_strides = {8, 4, 4, 2, 1};
  task.stat_strides = {8, 1, 1, 4, 2};  // [batch, head, row]
  task.kv_strides = {4, 2, 2, 1, 0};

  reference::attend(task);

  CHECK(acc == std::vector<double>{1, 1, 2, 2, 3, 3, 4, 4});
  CHECK(max == std::vector<double>(8, 1.0));
  CHECK(sum == std::vector<double>(8, 1.0));
}

TEST_CASE("reference attend reads fp16 and bf16 as the numbers they stand for", "[kernels]") {
  const std::array<std::pair<DType, std::uint16_t>, 2> minus_one_and_a_half{{{DType::fp16, 0xbe00}, {DType::bf16, 0xbfc0}}};
  for (const auto& [dtype, bits] : minus_one_and_a_half) {
    OneHead head({0.0F}, {0.0F}, {0.0F}, 1);
    AttendTask task = head.task(2.0);
    task.dtype = dtype;
    task.q = task.k = task.v = &bits;

    reference::attend(task);

    CHECK(head.max[0] == 4.5);
    CHECK(head.acc[0] == -1.5);
  }
}

TEST_CASE("reference attend makes a row NaN that sees a NaN or positive infinite score, and no other row", "[kernels]") {
  const float bad = GENERATE(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity());
  OneHead head({1.0F, 1.0F}, {0.0F, bad}, {1.0F, 1.0F}, 1);
  AttendTask task = head.task(1.0);
  task.mask = Mask::causal;

  reference::attend(task);

  CHECK(head.acc[0] == 1.0);
  CHECK(std::isnan(head.acc[1]));
  CHECK(std::isnan(head.sum[1]));
}

TEST_CASE("reference finish divides by the sum once and takes the logarithm of the denominator", "[kernels]") {
  OneNumber part{6.0, 2.0, 4.0};

  const Finished result = finish({part.pointers()}, 1, Combine::lse, 0.5);

  CHECK(result.out[0] == 0.75F);
  CHECK(result.lse[0] == static_cast<float>(2.0 + std::log(4.0)));
}

TEST_CASE("reference finish combines branches by lse, mean and sum over those that cover the row", "[kernels]") {
  // Outputs 10 and 20 with softmax masses 1 and 3; a third branch does not cover the row.
  OneNumber first{10.0, 0.0, 1.0};
  OneNumber second{60.0, 0.0, 3.0};
  OneNumber absent;
  const std::vector<PartialPointers> partials{first.pointers(), second.pointers(), absent.pointers()};

  CHECK(finish(partials, 1, Combine::lse).out[0] == 17.5F);
  CHECK(finish(partials, 1, Combine::mean).out[0] == 15.0F);
  CHECK(finish(partials, 1, Combine::sum).out[0] == 30.0F);
  CHECK(finish(partials, 1, Combine::sum, 0.25).out[0] == 7.5F);
  for (const Combine combine : {Combine::lse, Combine::mean, Combine::sum}) {
    CHECK(finish(partials, 1, combine).lse[0] == static_cast<float>(std::log(4.0)));
  }
}

TEST_CASE("reference finish folds keys that every row sees into each branch under mean and sum, and once under lse", "[kernels]") {
  // Sums of weights 1 and 3 with outputs 10 and 20, a branch that does not cover the row, and extra keys of weight 1 with output 30.
  OneNumber first{10.0, 0.0, 1.0};
  OneNumber second{60.0, 0.0, 3.0};
  OneNumber absent;
  OneNumber extra{30.0, 0.0, 1.0};
  const std::vector<PartialPointers> partials{first.pointers(), second.pointers(), absent.pointers(), extra.pointers()};

  CHECK(finish(partials, 1, Combine::lse, 1.0, 3).out[0] == 20.0F);  // (10 + 60 + 30) / 5
  CHECK(finish(partials, 1, Combine::sum, 1.0, 3).out[0] == 42.5F);  // (10 + 30) / 2 + (60 + 30) / 4
  CHECK(finish(partials, 1, Combine::mean, 1.0, 3).out[0] == 21.25F);
  const std::vector<PartialPointers> alone{absent.pointers(), extra.pointers()};
  for (const Combine combine : {Combine::lse, Combine::mean, Combine::sum}) {
    CHECK(finish(partials, 1, combine, 1.0, 3).lse[0] == static_cast<float>(std::log(5.0)));
    CHECK(finish(alone, 1, combine, 1.0, 1).out[0] == 30.0F);
    CHECK(finish(alone, 1, combine, 1.0, 1).lse[0] == 0.0F);
  }
}

TEST_CASE("reference finish gives zero and minus infinity for a row that nothing covers", "[kernels]") {
  OneNumber first;
  OneNumber second;
  for (const Combine combine : {Combine::lse, Combine::mean, Combine::sum}) {
    const Finished result = finish({first.pointers(), second.pointers()}, 1, combine);

    CHECK(result.out[0] == 0.0F);
    CHECK(result.lse[0] == -std::numeric_limits<float>::infinity());
  }
}

TEST_CASE("reference finish rounds to 16 bits once, from fp64", "[kernels]") {
  // Just above half way between two neighbours: rounding to fp32 first would land on the tie and go down to even.
  const auto narrowed = [](DType dtype, double value) {
    OneNumber part{value, 0.0, 1.0};
    std::uint16_t out = 0;
    float lse = 0.0F;
    FinishTask task;
    task.dtype = dtype;
    task.batch = task.rows = task.heads = task.head_dim = 1;
    task.partial[0] = part.pointers();
    task.out = &out;
    task.lse = &lse;
    reference::finish(task);
    return out;
  };

  CHECK(narrowed(DType::fp16, 1.0 + 0x1p-11 + 0x1p-40) == 0x3c01);
  CHECK(narrowed(DType::fp16, 1.0 + 0x1p-11) == 0x3c00);
  CHECK(narrowed(DType::fp16, -1.0 - 0x1p-11 - 0x1p-40) == 0xbc01);
  CHECK(narrowed(DType::bf16, 1.0 + 0x1p-8 + 0x1p-40) == 0x3f81);
  CHECK(narrowed(DType::bf16, 1.0 + 0x1p-8 - 0x1p-40) == 0x3f80);
}

TEST_CASE("reference pack gathers every third row of both heads", "[kernels]") {
  // src [rows 5, heads 2, head_dim 1] holds 10*row + head; rows 1 and 4.
  std::vector<float> src{0, 1, 10, 11, 20, 21, 30, 31, 40, 41};
  std::vector<float> dst(4);
  PackTask task;
  task.element_size = 4;
  task.batch = task.head_dim = 1;
  task.rows = task.heads = 2;
  task.src = src.data() + 2;
  task.dst = dst.data();
  task.src_row_stride = 6;
  task.src_head_stride = 1;

  reference::pack(task);

  CHECK(dst == std::vector<float>{10, 11, 40, 41});
}

}  // namespace
}  // namespace annulus::kernels
