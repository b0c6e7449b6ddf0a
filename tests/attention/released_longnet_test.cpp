// SPDX-License-Identifier: Apache-2.0
// What released LongNet models compute, step by step as they do: the sequence is padded with zeros to whole segments, segments to whole
// strides, blocks of heads take every r-th row of a segment, all of it attends all of it, and branches mix by their softmax sums. In fp64,
// row by row, without the pattern's code. Built once for the kernels on the CPU and once for those of a GPU.
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/io/source.hpp>
#include <annulus/session/session.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

using namespace annulus;

namespace {

const bool kOnGpu = std::string(ANNULUS_TEST_BACKEND) == "cuda";

struct Row {
  std::vector<double> out;
  double lse = 0;
};

class Model {
 public:
  Model(const Problem& problem, std::vector<Branch> branches, std::uint64_t seed)
      : problem_(problem), branches_(std::move(branches)), source_(make_generator(problem, seed, 2)) {
    for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v}) {
      std::vector<std::byte> bytes(static_cast<std::size_t>(problem.seq_len * width() * size_of(problem.dtype)));
      source_->read(tensor, 0, 0, problem.seq_len, problem.dtype, bytes.data());
      kernels::with_element(problem.dtype, [&](auto tag) {
        const auto* const elements = reinterpret_cast<const decltype(tag)*>(bytes.data());
        for (std::int64_t i = 0; i < problem.seq_len * width(); ++i) {
          values_[static_cast<std::size_t>(tensor)].push_back(kernels::to_float(elements[i]));
        }
      });
    }
  }

  Row row(std::int64_t token, std::int64_t head) const {
    std::vector<double> scores;
    std::vector<std::optional<std::int64_t>> keys;  // none: padding
    for (const auto& [w, r] : branches_) {
      const std::int64_t segment_length = std::min(w, problem_.seq_len);
      const std::int64_t block = (problem_.heads + r - 1) / r;
      const std::int64_t place = token % segment_length;
      if (place % r != head / block) { continue; }
      const std::int64_t padded = (segment_length + r - 1) / r * r;
      for (std::int64_t key = head / block; key < padded; key += r) {
        const std::int64_t key_token = token - place + key;
        const bool exists = key < segment_length && key_token < problem_.seq_len;
        keys.push_back(exists ? std::optional(key_token) : std::nullopt);
        scores.push_back(exists ? score(token, key_token, head) : 0.0);
      }
    }
    Row result{std::vector<double>(static_cast<std::size_t>(problem_.head_dim), 0.0), 0.0};
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const double weight = std::exp(scores[i] - largest);
      sum += weight;
      for (std::int64_t d = 0; keys[i] && d < problem_.head_dim; ++d) {
        result.out[static_cast<std::size_t>(d)] += weight * value(Tensor::v, *keys[i], head, d);
      }
    }
    for (double& element : result.out) { element /= sum; }
    result.lse = largest + std::log(sum);
    return result;
  }

 private:
  std::int64_t width() const { return problem_.heads * problem_.head_dim; }
  double value(Tensor tensor, std::int64_t token, std::int64_t head, std::int64_t d) const {
    return static_cast<double>(
        values_[static_cast<std::size_t>(tensor)][static_cast<std::size_t>(token * width() + head * problem_.head_dim + d)]);
  }
  double score(std::int64_t query, std::int64_t key, std::int64_t head) const {
    double dot = 0;
    for (std::int64_t d = 0; d < problem_.head_dim; ++d) { dot += value(Tensor::q, query, head, d) * value(Tensor::k, key, head, d); }
    return dot * problem_.scale;
  }

  Problem problem_;
  std::vector<Branch> branches_;
  std::shared_ptr<const TensorSource> source_;
  std::vector<float> values_[3];
};

/// Compares every `stride`-th row of every head with the model's.
void compare(const Config& config, std::int64_t stride, double limit, double lse_limit) {
  const Communicator comm = Communicator::single();
  const ResolvedConfig resolved = resolve(config, comm);
  const Problem& problem = resolved.config.problem;
  Session session(resolved, comm);
  session.load();
  session.run();
  const Model model(problem, config.pattern.branches, config.seed);
  const std::int64_t width = problem.heads * problem.head_dim;
  double difference = 0;
  double norm = 0;
  double worst_lse = 0;
  std::int64_t first = 0;
  for (const auto& executor : session.executors()) {
    const std::int64_t rows = executor->plan().local_rows;
    std::vector<std::byte> out(static_cast<std::size_t>(rows * width * size_of(problem.dtype)));
    std::vector<float> lse(static_cast<std::size_t>(rows * problem.heads));
    executor->read_output(0, 0, rows, out.data());
    executor->read_lse(0, 0, rows, lse.data());
    for (std::int64_t row = (stride - first % stride) % stride; row < rows; row += stride) {
      for (std::int64_t head = 0; head < problem.heads; ++head) {
        const Row expected = model.row(first + row, head);
        worst_lse = std::max(worst_lse, std::abs(static_cast<double>(lse[static_cast<std::size_t>(head * rows + row)]) - expected.lse));
        kernels::with_element(problem.dtype, [&](auto tag) {
          const auto* const found = reinterpret_cast<const decltype(tag)*>(out.data()) + row * width + head * problem.head_dim;
          for (std::int64_t d = 0; d < problem.head_dim; ++d) {
            const double want = expected.out[static_cast<std::size_t>(d)];
            const double error = static_cast<double>(kernels::to_float(found[d])) - want;
            difference += error * error;
            norm += want * want;
          }
        });
      }
    }
    first += rows;
  }
  REQUIRE(first == problem.seq_len);
  CHECK(std::sqrt(difference / norm) < limit);
  CHECK(worst_lse < lse_limit);
}

Config config_of(std::int64_t seq_len, std::int64_t heads, std::int64_t head_dim, DType dtype, std::int64_t ranks) {
  Config config;
  config.problem = {1, seq_len, heads, heads, head_dim, dtype, false, 1.0};
  config.dtype = dtype;
  config.seed = 5;
  config.threads = 2;
  config.backend = kOnGpu ? BackendKind::cuda : BackendKind::cpu;
  config.virtual_ranks = ranks;
  config.transport = ranks > 1 ? TransportKind::loopback : TransportKind::self;
  config.pattern.offset = OffsetRule::head_block;
  config.pattern.head_split = HeadSplit::all;
  config.pattern.ragged = Ragged::zero_keys;
  return config;
}

bool skipped() {
  if (!kOnGpu || !visible_gpus().empty()) { return false; }
  test::skip("no GPU");
  return true;
}

}  // namespace

TEST_CASE("released LongNet models are met on 1, 2, 3 and 4 ranks, padding with keys of zeros included") {
  if (skipped()) { return; }
  const std::vector<Branch> branches{{1024, 1}, {5792, 2}, {32768, 4}, {185363, 8}, {1048576, 16}};
  for (const std::int64_t seq_len : {1, 14, 777, 10001, 45681}) {
    for (std::int64_t ranks = 1; ranks <= 4; ++ranks) {
      Config config = config_of(seq_len, 16, kOnGpu ? 48 : 8, DType::fp32, ranks);
      config.pattern.branches = branches;
      CAPTURE(seq_len, ranks);
      compare(config, 1 + seq_len / 40, 1e-5, 1e-5);
      if (!kOnGpu) { continue; }
      config.dtype = config.problem.dtype = DType::fp16;
      compare(config, 1 + seq_len / 40, 1e-3, 1e-3);
    }
  }
}

TEST_CASE("segments that end early and rates that divide neither heads nor segments are met") {
  if (skipped()) { return; }
  for (const std::int64_t heads : {5, 16}) {
    for (std::int64_t ranks = 1; ranks <= 4; ++ranks) {
      for (const std::int64_t seq_len : {1, 61, 777}) {
        Config config = config_of(seq_len, heads, 24, DType::fp32, ranks);
        config.pattern.branches = {{64, 1}, {200, 2}, {333, 3}, {1000, 16}};
        CAPTURE(heads, ranks, seq_len);
        compare(config, 1, 1e-5, 1e-5);
        if (!kOnGpu) { continue; }
        config.dtype = config.problem.dtype = DType::bf16;
        compare(config, 1, 4e-3, 1e-3);
      }
    }
  }
}

TEST_CASE("keys of zeros take the softmax where all scores are far below 0, and nothing where they are far above") {
  if (skipped()) { return; }
  for (const double scale : {-3.0, 3.0}) {
    Config config = config_of(70, 2, 16, DType::fp32, 2);
    config.pattern.branches = {{64, 1}};
    config.scale = scale;
    compare(config, 1, 1e-5, 5e-5);
    if (!kOnGpu) { continue; }
    config.dtype = config.problem.dtype = DType::bf16;
    compare(config, 1, 4e-3, 2e-3);
  }
}
