// SPDX-License-Identifier: Apache-2.0
// Each attention of the Python family that this program succeeds, as a setting: `annulus run` against an account of the attention that is
// written down here, token by token, and shares nothing with patterns and plans. configs/README.md says which module is which row.
#include <annulus/io/source.hpp>
#include <annulus_test.hpp>

#include "../io/raw_dataset.hpp"
#include "process.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

using namespace annulus;
using annulus::test::ProcessResult;
using annulus::test::RawDataset;
using annulus::test::run_process;
using annulus::test::TemporaryFolder;

namespace {

constexpr int kTokens = 97;
constexpr int kHeads = 8;
constexpr int kHeadDim = 16;
constexpr int kBatch = 2;
constexpr int kGroups = 3;
constexpr int kLengths[kGroups] = {16, 40, 97};
constexpr int kRates[kGroups] = {1, 2, 3};
constexpr int kSeed = 5;

const bool kOnGpu = std::string_view(ANNULUS_TEST_BACKEND) == "cuda";

using Keys = std::vector<int>;

/// The softmaxes that a query of a head takes part in, each over its own keys; none where nothing covers it.
using Softmaxes = std::function<std::vector<Keys>(int head, int query)>;

struct Row {
  std::string name;
  std::vector<std::string> flags;
  Softmaxes softmaxes;
  bool causal = false;     ///< keys after the query are hidden, by their place in the sequence
  double divisor = 1;      ///< of the output
  std::vector<int> order;  ///< token at each place, where the attention is of the permuted sequence; else empty
  /// Flags that put a policy of the row back to what it is by default: each must give another result.
  std::vector<std::vector<std::string>> defaults;
};

// ---- What the modules compute, or meant to ----

/// 8 heads in 3 groups of neighbours: 3, 3, 2, or with the spare heads in the last groups 2, 3, 3.
int group_of(int head, bool spare_last) { return spare_last ? (head < 2 ? 0 : head < 5 ? 1 : 2) : (head < 3 ? 0 : head < 6 ? 1 : 2); }

struct Segment {
  int number = 0;
  int begin = 0;
  int end = 0;
};

Segment segment_of(int group, int token) {
  const int length = kLengths[group];
  const int number = token / length;
  return {number, number * length, std::min(kTokens, (number + 1) * length)};
}

/// Every rate-th token from an offset on, to the segment's end.
Keys strided(const Segment& segment, int rate, int offset) {
  Keys keys;
  for (int token = segment.begin + offset; token < segment.end; token += rate) { keys.push_back(token); }
  return keys;
}

/// As many for every offset: strides past the segment's end go on at its start.
Keys wrapped(const Segment& segment, int rate, int offset) {
  const int length = segment.end - segment.begin;
  Keys keys;
  for (int step = 0; step * rate < length; ++step) { keys.push_back(segment.begin + (offset + step * rate) % length); }
  return keys;
}

std::vector<Keys> if_covered(Keys keys, int query) {
  if (std::find(keys.begin(), keys.end(), query) == keys.end()) { return {}; }
  return {std::move(keys)};
}

std::vector<Keys> all_tokens(int /*head*/, int /*query*/) {
  Keys keys(kTokens);
  std::iota(keys.begin(), keys.end(), 0);
  return {keys};
}

std::vector<Keys> hybrid(int head, int query) {
  const int group = group_of(head, false);
  return if_covered(wrapped(segment_of(group, query), kRates[group], group % kRates[group]), query);
}

std::vector<Keys> hybrid_group_plus_segment(int head, int query) {
  const int group = group_of(head, false);
  const Segment segment = segment_of(group, query);
  return if_covered(wrapped(segment, kRates[group], (group + segment.number) % kRates[group]), query);
}

std::vector<Keys> production(int head, int query) {
  const int group = group_of(head, true);
  const Segment segment = segment_of(group, query);
  const bool tail = segment.end - segment.begin < kLengths[group];
  return if_covered(strided(segment, tail ? 1 : kRates[group], tail ? 0 : group % kRates[group]), query);
}

std::vector<Keys> mean_over_all(int /*head*/, int query) {
  std::vector<Keys> softmaxes;
  for (int group = 0; group < kGroups; ++group) {
    const Segment segment = segment_of(group, query);
    for (Keys& keys : if_covered(strided(segment, kRates[group], segment.number % kRates[group]), query)) {
      softmaxes.push_back(std::move(keys));
    }
  }
  return softmaxes;
}

/// The cell of a square of side 16, row by row, that a Hilbert curve meets at a distance from its start.
int cell_on_curve(int distance) {
  int x = 0;
  int y = 0;
  for (int square = 1; square < 16; square *= 2, distance /= 4) {
    const int right = distance / 2 % 2;
    const int down = (distance % 2) ^ right;
    if (down == 0) {
      if (right == 1) {
        x = square - 1 - x;
        y = square - 1 - y;
      }
      std::swap(x, y);
    }
    x += square * right;
    y += square * down;
  }
  return y * 16 + x;
}

/// Place i holds the token that row i's rank on the curve names: the module gathers by ranks, where the order of visits would be its
/// inverse.
std::vector<int> ranks_on_curve() {
  std::vector<int> ranks(kTokens, -1);
  int visited = 0;
  for (int distance = 0; distance < 16 * 16; ++distance) {
    const int cell = cell_on_curve(distance);
    if (cell < kTokens) { ranks[static_cast<std::size_t>(cell)] = visited++; }
  }
  return ranks;
}

/// Numbers of 7 bits, read from the other end, that are tokens.
std::vector<int> reversed_bits() {
  std::vector<int> order;
  for (int number = 0; number < 128; ++number) {
    int reversed = 0;
    for (int bit = 0; bit < 7; ++bit) { reversed |= (number >> bit & 1) << (6 - bit); }
    if (reversed < kTokens) { order.push_back(reversed); }
  }
  return order;
}

// ---- The rows ----

std::vector<Row> rows() {
  const std::vector<std::string> lengths{"--segment-lengths", "16,40,97", "--dilation-rates", "1,2,3"};
  const auto with = [&](std::vector<std::string> flags) {
    flags.insert(flags.end(), lengths.begin(), lengths.end());
    return flags;
  };
  const std::vector<std::vector<std::string>> none;
  return {
      {"dense", {"--preset", "dense"}, all_tokens, false, 1, {}, none},
      {"dense, every block to every rank", {"--preset", "dense", "--schedule", "ring-full"}, all_tokens, false, 1, {}, none},
      {"dense-causal", {"--preset", "dense-causal"}, all_tokens, true, 1, {}, {{"--causal", "false"}}},
      {"dense-causal in buckets", {"--preset", "dense-causal", "--tile-rows", "32"}, all_tokens, true, 1, {}, {{"--causal", "false"}}},
      {"production",
       with({"--preset", "production"}),
       production,
       false,
       1,
       {},
       {{"--head-split", "first"}, {"--ragged", "short"}, {"--offset", "segment"}}},
      {"production, causal", with({"--preset", "production", "--causal"}), production, true, 1, {}, {{"--causal", "false"}}},
      {"hybrid", with({"--preset", "hybrid"}), hybrid, false, 1, {}, {{"--ragged", "short"}, {"--head-split", "last"}}},
      {"hybrid, causal", with({"--preset", "hybrid", "--causal"}), hybrid, true, 1, {}, {{"--causal", "false"}}},
      {"hybrid by all-gather", with({"--preset", "hybrid", "--schedule", "allgather"}), hybrid, false, 1, {}, none},
      {"hybrid, divided by the groups",
       with({"--preset", "hybrid", "--scale-by-branches"}),
       hybrid,
       false,
       3,
       {},
       {{"--scale-by-branches", "false"}}},
      {"hybrid-group-plus-segment",
       with({"--preset", "hybrid-group-plus-segment"}),
       hybrid_group_plus_segment,
       false,
       1,
       {},
       {{"--offset", "group"}}},
      {"hilbert", with({"--preset", "hilbert"}), hybrid, false, 1, {}, none},
      {"hilbert, causal", with({"--preset", "hilbert", "--causal"}), hybrid, true, 1, {}, {{"--causal", "false"}}},
      {"hilbert-permuted", with({"--preset", "hilbert-permuted"}), hybrid, false, 1, ranks_on_curve(), {{"--order", "linear"}}},
      {"hybrid by reversed bits",
       with({"--preset", "hybrid", "--order", "bit-reversal"}),
       hybrid,
       false,
       1,
       reversed_bits(),
       {{"--order", "linear"}}},
      {"mean over all branches",
       with({"--offset", "segment", "--head-split", "all", "--mixing", "mean"}),
       mean_over_all,
       false,
       1,
       {},
       {{"--offset", "group"}, {"--head-split", "first"}, {"--mixing", "lse"}}},
      {"distributed", with({"--preset", "distributed"}), hybrid, false, 1, {}, none},
      {"distributed, causal", with({"--preset", "distributed", "--causal"}), hybrid, true, 1, {}, {{"--causal", "false"}}},
  };
}

// ---- Numbers ----

struct Result {
  std::vector<double> out;  ///< [batch, token, head, dim]
  std::vector<double> lse;  ///< [batch, head, token]
};

std::size_t out_index(int batch, int token, int head) {
  return ((static_cast<std::size_t>(batch) * kTokens + static_cast<std::size_t>(token)) * kHeads + static_cast<std::size_t>(head)) *
         kHeadDim;
}
std::size_t lse_index(int batch, int head, int token) {
  return (static_cast<std::size_t>(batch) * kHeads + static_cast<std::size_t>(head)) * kTokens + static_cast<std::size_t>(token);
}

class Inputs {
 public:
  Inputs() {
    Problem problem;
    problem.batch = kBatch;
    problem.seq_len = kTokens;
    problem.heads = problem.kv_heads = kHeads;
    problem.head_dim = kHeadDim;
    const auto source = make_generator(problem, kSeed);
    for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v}) {
      std::vector<float>& values = tensors_.emplace_back(kBatch * kTokens * kHeads * kHeadDim);
      for (int batch = 0; batch < kBatch; ++batch) {
        source->read(tensor, batch, 0, kTokens, DType::fp32, values.data() + out_index(batch, 0, 0));
      }
    }
  }
  const float* q(int batch, int token, int head) const { return tensors_[0].data() + out_index(batch, token, head); }
  const float* k(int batch, int token, int head) const { return tensors_[1].data() + out_index(batch, token, head); }
  const float* v(int batch, int token, int head) const { return tensors_[2].data() + out_index(batch, token, head); }

 private:
  std::vector<std::vector<float>> tensors_;
};

Result expected(const Row& row, const Inputs& inputs) {
  Result result;
  result.out.assign(static_cast<std::size_t>(kBatch) * kTokens * kHeads * kHeadDim, 0.0);
  result.lse.assign(static_cast<std::size_t>(kBatch) * kHeads * kTokens, -std::numeric_limits<double>::infinity());
  const auto token_at = [&](int place) { return row.order.empty() ? place : row.order[static_cast<std::size_t>(place)]; };
  for (int batch = 0; batch < kBatch; ++batch) {
    for (int head = 0; head < kHeads; ++head) {
      for (int place = 0; place < kTokens; ++place) {
        const int query = token_at(place);
        const std::vector<Keys> softmaxes = row.softmaxes(head, place);
        double* out = result.out.data() + out_index(batch, query, head);
        double all = 0;
        for (const Keys& keys : softmaxes) {
          double sum = 0;
          std::vector<double> acc(kHeadDim, 0.0);
          for (const int key_place : keys) {
            const int key = token_at(key_place);
            if (row.causal && key > query) { continue; }
            double score = 0;
            for (int d = 0; d < kHeadDim; ++d) {
              score += static_cast<double>(inputs.q(batch, query, head)[d]) * static_cast<double>(inputs.k(batch, key, head)[d]);
            }
            const double weight = std::exp(score / std::sqrt(static_cast<double>(kHeadDim)));
            sum += weight;
            for (int d = 0; d < kHeadDim; ++d) {
              acc[static_cast<std::size_t>(d)] += weight * static_cast<double>(inputs.v(batch, key, head)[d]);
            }
          }
          all += sum;
          for (int d = 0; d < kHeadDim; ++d) {
            out[d] += acc[static_cast<std::size_t>(d)] / sum / static_cast<double>(softmaxes.size()) / row.divisor;
          }
        }
        if (!softmaxes.empty()) { result.lse[lse_index(batch, head, query)] = std::log(all); }
      }
    }
  }
  return result;
}

/// What `annulus run` writes on `ranks` processes, or as many virtual ranks of one.
Result found(const std::vector<std::string>& flags, int ranks, bool are_virtual) {
  const TemporaryFolder folder;
  const std::string path = folder / "o.h5";
  std::vector<std::string> command;
  if (!are_virtual) { command = {ANNULUS_LAUNCH, std::to_string(ranks)}; }
  command.insert(command.end(), {ANNULUS_PROGRAM, "run", "--seq-len", std::to_string(kTokens), "--heads", std::to_string(kHeads),
                                 "--head-dim", std::to_string(kHeadDim), "--batch", std::to_string(kBatch), "--seed", std::to_string(kSeed),
                                 "--output", path, "--backend", ANNULUS_TEST_BACKEND});
  if (are_virtual) { command.insert(command.end(), {"--virtual-ranks", std::to_string(ranks)}); }
  if (kOnGpu) { command.emplace_back("--share-gpu"); }
  command.insert(command.end(), flags.begin(), flags.end());
  const ProcessResult run = run_process(command, 100);
  INFO(run.err);
  REQUIRE(run.exit_code == 0);
  const RawDataset out(path, "/o");
  const RawDataset lse(path, "/lse");
  Result result;
  result.out.assign(out.as<float>(), out.as<float>() + out.bytes.size() / sizeof(float));
  result.lse.assign(lse.as<float>(), lse.as<float>() + lse.bytes.size() / sizeof(float));
  return result;
}

/// The largest difference; infinite where one of them sees a key and the other does not.
double difference(const Result& a, const Result& b) {
  REQUIRE(a.out.size() == b.out.size());
  REQUIRE(a.lse.size() == b.lse.size());
  double largest = 0;
  for (std::size_t i = 0; i < a.out.size(); ++i) { largest = std::max(largest, std::abs(a.out[i] - b.out[i])); }
  for (std::size_t i = 0; i < a.lse.size(); ++i) {
    if (a.lse[i] != b.lse[i]) { largest = std::max(largest, std::abs(a.lse[i] - b.lse[i])); }
  }
  return largest;
}

/// The flags with one of them set to another value.
std::vector<std::string> with_default(std::vector<std::string> flags, const std::vector<std::string>& policy) {
  const auto given = std::find(flags.begin(), flags.end(), policy.front());
  if (given != flags.end()) {
    const bool has_value = given + 1 != flags.end() && !(given + 1)->starts_with("--");
    flags.erase(given, given + (has_value ? 2 : 1));
  }
  flags.insert(flags.end(), policy.begin(), policy.end());
  return flags;
}

constexpr double kRounding = 2e-5;  // of fp32, in outputs and LSEs of a few units

}  // namespace

TEST_CASE("each attention of the family is what its definition says, on 1 to 4 ranks and 8 virtual ones") {
  const Inputs inputs;
  // On a GPU, where a start takes seconds, one and some that share it.
  const std::vector<int> numbers = kOnGpu ? std::vector<int>{1, 3} : std::vector<int>{1, 2, 3, 4};
  for (const Row& row : rows()) {
    const Result exact = expected(row, inputs);
    for (const int ranks : numbers) {
      INFO(row.name << " on " << ranks << " ranks");
      CHECK(difference(found(row.flags, ranks, false), exact) < kRounding);
    }
    INFO(row.name << " on 8 virtual ranks");
    CHECK(difference(found(row.flags, 8, true), exact) < kRounding);
  }
}

TEST_CASE("every preset runs as it stands") {
  const ProcessResult listed = run_process({ANNULUS_PROGRAM, "run", "--preset", "list"}, 60);
  REQUIRE(listed.exit_code == 0);
  const TemporaryFolder folder;
  int presets = 0;
  std::istringstream lines(listed.out);
  for (std::string line; std::getline(lines, line);) {
    const std::string name = line.substr(0, line.find(' '));
    INFO(name);
    // A few tokens more than a segment of the shortest branch, on rings of one and of three.
    for (const char* ranks : {"1", "3"}) {
      std::vector<std::string> command{ANNULUS_PROGRAM,   "run",
                                       "--preset",        name,
                                       "--virtual-ranks", ranks,
                                       "--seq-len",       "2100",
                                       "--heads",         "6",
                                       "--head-dim",      "8",
                                       "--backend",       ANNULUS_TEST_BACKEND,
                                       "--output",        folder / "o.h5",
                                       "--force"};
      const ProcessResult run = run_process(command, 100);
      INFO(run.err);
      CHECK(run.exit_code == 0);
    }
    ++presets;
  }
  CHECK(presets > 10);
}

TEST_CASE("a row that loses its policy is found out") {
  if (kOnGpu) { return; }  // what settings mean does not depend on the backend
  const Inputs inputs;
  for (const Row& row : rows()) {
    const Result exact = expected(row, inputs);
    for (const std::vector<std::string>& policy : row.defaults) {
      INFO(row.name << " with " << policy.front() << " " << policy.back());
      CHECK(difference(found(with_default(row.flags, policy), 2, true), exact) > 1000 * kRounding);
    }
  }
}

TEST_CASE("the definitions give the family's acceptance vectors") {
  // Values are the tokens' numbers and all scores 0, so that outputs are means of the attended tokens.
  const auto mean_of = [](const Keys& keys) { return std::accumulate(keys.begin(), keys.end(), 0.0) / static_cast<double>(keys.size()); };
  CHECK(mean_of(strided({0, 0, 8}, 2, 0)) == 3);
  CHECK(mean_of(strided({1, 8, 16}, 2, 0)) == 11);
  CHECK(mean_of(strided({1, 8, 16}, 2, 1)) == 12);
  CHECK(wrapped({0, 0, 10}, 3, 1) == Keys{1, 4, 7, 0});
  CHECK(strided({0, 0, 10}, 3, 1) == Keys{1, 4, 7});
  const std::vector<int> reversed = reversed_bits();
  CHECK(std::vector<int>(reversed.begin(), reversed.begin() + 4) == std::vector<int>{0, 64, 32, 96});
}
