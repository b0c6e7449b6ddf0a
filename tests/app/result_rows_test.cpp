// SPDX-License-Identifier: Apache-2.0
// What stands in the file that users get: every row of /o, /lse and the gradients of `annulus run`, read back.
#include <annulus/io/source.hpp>
#include <annulus/kernels/dtype.hpp>
#include <annulus/verify/compare.hpp>
#include <annulus_test.hpp>

#include "../io/raw_dataset.hpp"
#include "process.hpp"

#include <hdf5.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

using namespace annulus;
using annulus::test::ProcessResult;
using annulus::test::RawDataset;
using annulus::test::run_process;
using annulus::test::TemporaryFolder;

namespace {

constexpr std::uint64_t kSeed = 41;

struct Case {
  std::string name;
  Problem problem;
  Pattern pattern;
  std::vector<std::string> flags;  ///< that make this problem and pattern
};

Problem problem_of(std::int64_t seq_len, std::int64_t heads, std::int64_t kv_heads, DType dtype, bool causal) {
  return {2, seq_len, heads, kv_heads, 8, dtype, causal, 0.25};
}

std::vector<std::string> flags_of(const Problem& problem, const std::vector<std::string>& more) {
  std::vector<std::string> flags{"--batch",    std::to_string(problem.batch),
                                 "--seq-len",  std::to_string(problem.seq_len),
                                 "--heads",    std::to_string(problem.heads),
                                 "--kv-heads", std::to_string(problem.kv_heads),
                                 "--head-dim", std::to_string(problem.head_dim),
                                 "--dtype",    std::string(to_string(problem.dtype)),
                                 "--scale",    "0.25",
                                 "--seed",     std::to_string(kSeed)};
  if (problem.causal) { flags.emplace_back("--causal"); }
  flags.insert(flags.end(), more.begin(), more.end());
  return flags;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, const Problem& problem, const Pattern& pattern, const std::vector<std::string>& more) {
    all.push_back({name, problem, pattern, flags_of(problem, more)});
  };
  add("dense", problem_of(37, 2, 1, DType::fp32, false), dense_pattern(37), {});
  add("causal bf16", problem_of(53, 3, 3, DType::bf16, true), dense_pattern(53), {"--backend", "reference"});
  Pattern dilated;
  dilated.branches = {{7, 1}, {19, 2}, {41, 3}};
  dilated.offset = OffsetRule::head;
  add("dilated, with rows that nothing covers", problem_of(41, 5, 5, DType::fp32, true), dilated,
      {"--segment-lengths", "7,19,41", "--dilation-rates", "1,2,3", "--offset", "head"});
  dilated.head_split = HeadSplit::all;
  dilated.mixing = Mixing::mean;
  add("fp16, every head in every branch", problem_of(41, 2, 2, DType::fp16, false), dilated,
      {"--segment-lengths", "7,19,41", "--dilation-rates", "1,2,3", "--offset", "head", "--head-split", "all", "--mixing", "mean"});
  add("zigzag", problem_of(53, 4, 2, DType::fp32, true), dense_pattern(53), {"--partition", "zigzag", "--schedule", "ring-full"});
  add("striped", problem_of(53, 4, 2, DType::bf16, true), dense_pattern(53), {"--partition", "striped"});
  Pattern striped = dilated;
  striped.order = SequenceOrder::hilbert;
  add("order hilbert, striped, dilated", problem_of(41, 2, 2, DType::fp32, false), striped,
      {"--segment-lengths", "7,19,41", "--dilation-rates", "1,2,3", "--offset", "head", "--head-split", "all", "--mixing", "mean",
       "--order", "hilbert", "--partition", "striped", "--schedule", "direct"});
  for (const auto& [order, name] : EnumNames<SequenceOrder>::values) {
    if (order == SequenceOrder::linear) { continue; }
    Pattern permuted = dilated;
    permuted.order = order;
    add("order " + std::string(name), problem_of(41, 2, 1, DType::fp16, false), permuted,
        {"--segment-lengths", "7,19,41", "--dilation-rates", "1,2,3", "--offset", "head", "--head-split", "all", "--mixing", "mean",
         "--order", std::string(name)});
  }
  Pattern zigzag = dense_pattern(53);
  zigzag.branches = {{20, 3}};
  zigzag.order = SequenceOrder::hilbert;
  add("order hilbert, zigzag", problem_of(53, 4, 2, DType::fp32, false), zigzag,
      {"--segment-lengths", "20", "--dilation-rates", "3", "--order", "hilbert", "--partition", "zigzag"});
  // Fewer rows than ranks.
  Pattern short_one = dense_pattern(3);
  short_one.order = SequenceOrder::bit_reversal;
  add("three rows in another order", problem_of(3, 2, 2, DType::fp32, false), short_one, {"--order", "bit-reversal"});
  add("three rows", problem_of(3, 2, 2, DType::fp32, false), dense_pattern(3), {});
  return all;
}

std::vector<RowId> all_rows(const Problem& problem) {
  std::vector<RowId> all;
  for (std::int64_t index = 0; index < problem.batch * problem.seq_len; ++index) {
    all.push_back({index / problem.seq_len, index % problem.seq_len});
  }
  return all;
}

/// The file's rows, in the order of (batch, row).
struct Rows {
  std::vector<std::uint8_t> out;  ///< [row][head][head_dim] in the problem's dtype
  std::vector<float> lse;         ///< [row][head]
};

Rows rows_in(const std::string& path, const Problem& problem) {
  const RawDataset out(path, "/o");
  const RawDataset lse(path, "/lse");
  const auto size = [](std::int64_t extent) { return static_cast<hsize_t>(extent); };
  REQUIRE(out.extents == std::vector<hsize_t>{size(problem.batch), size(problem.seq_len), size(problem.heads), size(problem.head_dim)});
  REQUIRE(lse.extents == std::vector<hsize_t>{size(problem.batch), size(problem.heads), size(problem.seq_len)});
  Rows rows{out.bytes, {}};
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    for (std::int64_t row = 0; row < problem.seq_len; ++row) {
      for (std::int64_t head = 0; head < problem.heads; ++head) {
        rows.lse.push_back(lse.as<float>()[(batch * problem.heads + head) * problem.seq_len + row]);
      }
    }
  }
  return rows;
}

/// Largest difference between two files' outputs; infinite where one is finite and the other not.
double largest_difference(const Problem& problem, const Rows& a, const Rows& b) {
  return kernels::with_element(problem.dtype, [&](auto tag) {
    using Element = decltype(tag);
    const auto* first = reinterpret_cast<const Element*>(a.out.data());
    const auto* second = reinterpret_cast<const Element*>(b.out.data());
    double largest = 0;
    for (std::size_t i = 0; i < a.out.size() / sizeof(Element); ++i) {
      largest =
          std::max(largest, std::abs(static_cast<double>(kernels::to_float(first[i])) - static_cast<double>(kernels::to_float(second[i]))));
    }
    for (std::size_t i = 0; i < a.lse.size(); ++i) {
      if (a.lse[i] == b.lse[i]) { continue; }  // also two that are -inf
      largest = std::max(largest, std::abs(static_cast<double>(a.lse[i]) - static_cast<double>(b.lse[i])));
    }
    return largest;
  });
}

/// One rounding of numbers near 1, of which the values are; 16-bit outputs may fall on either side of one.
double rounding_of(DType dtype) {
  switch (dtype) {
    case DType::fp16:
      return 0x1p-9;
    case DType::bf16:
      return 0x1p-6;
    case DType::fp32:
      break;
  }
  return 1e-5;
}

}  // namespace

TEST_CASE("every row of /o and /lse is the oracle's and one rank's, from 1 to 4 ranks and their grids") {
  for (const Case& each : cases()) {
    const Problem& problem = each.problem;
    const std::vector<RowId> all = all_rows(problem);
    const OracleRows oracle = oracle_rows(*make_generator(problem, kSeed), problem, each.pattern, all, PlainProbabilities::kept, 1);
    Rows alone;
    for (std::int64_t ranks = 1; ranks <= 4; ++ranks) {
      INFO(each.name << " on " << ranks << " ranks");
      const TemporaryFolder folder;
      const std::string path = folder / "out.h5";
      std::vector<std::string> grids{"seq=" + std::to_string(ranks)};
      if (ranks == 3) { grids.emplace_back(problem.heads >= 3 ? "heads=3" : "seq=3"); }
      if (ranks == 4) { grids.insert(grids.end(), {"batch=2", "heads=2", "batch=2,heads=2"}); }
      for (const std::string& grid : grids) {
        INFO("grid " << grid);
        std::vector<std::string> command{ANNULUS_LAUNCH, std::to_string(ranks), ANNULUS_PROGRAM, "run", "--force", "--output", path};
        command.insert(command.end(), {"--grid", grid});
        command.insert(command.end(), each.flags.begin(), each.flags.end());
        const ProcessResult result = run_process(command, 60);
        INFO(result.err);
        REQUIRE(result.exit_code == 0);

        const Rows rows = rows_in(path, problem);
        const ErrorSums sums = compare_rows(problem, all, rows.out.data(), rows.lse.data(), oracle);
        require_all_compared(problem, static_cast<std::int64_t>(all.size()), sums);
        const Verdict verdict = judge(problem, sums);
        INFO(verdict.reason);
        CHECK(verdict.passed);
        if (ranks == 1) { alone = rows; }
        CHECK(largest_difference(problem, rows, alone) <= rounding_of(problem.dtype));
      }
    }
  }
}

namespace {

/// That the gradients in a file are what differentiating the definition gives.
void expect_gradients(const std::string& path, const Problem& problem, const GradientRows& oracle) {
  const std::vector<RowId> all = all_rows(problem);
  const RawDataset dq(path, "/dq");
  const RawDataset dk(path, "/dk");
  const RawDataset dv(path, "/dv");
  const auto size = [](std::int64_t extent) { return static_cast<hsize_t>(extent); };
  CHECK(dq.extents == std::vector<hsize_t>{size(problem.batch), size(problem.seq_len), size(problem.heads), size(problem.head_dim)});
  REQUIRE(dk.extents == std::vector<hsize_t>{size(problem.batch), size(problem.seq_len), size(problem.kv_heads), size(problem.head_dim)});
  REQUIRE(dv.extents == dk.extents);
  const GradientSums sums =
      compare_gradients(problem, all, {0, problem.kv_heads}, {dq.bytes.data(), dk.bytes.data(), dv.bytes.data()}, oracle);
  CHECK(sums.dq.count == problem.batch * problem.seq_len * problem.heads * problem.head_dim);
  CHECK(sums.dk.count == problem.batch * problem.seq_len * problem.kv_heads * problem.head_dim);
  for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v}) {
    const Verdict verdict = judge_gradient(problem, sums, tensor);
    INFO("gradient number " << static_cast<int>(tensor) << ": " << verdict.reason);
    CHECK(verdict.passed);
  }
}

void write_values(hid_t file, const char* name, const TensorSource& source, Tensor tensor) {
  const Problem& problem = source.problem();
  const std::int64_t bytes = row_bytes(problem, tensor);
  std::vector<std::byte> rows(static_cast<std::size_t>(problem.batch * problem.seq_len * bytes));
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    source.read(tensor, batch, 0, problem.seq_len, problem.dtype, rows.data() + batch * problem.seq_len * bytes);
  }
  const hsize_t extents[4] = {static_cast<hsize_t>(problem.batch), static_cast<hsize_t>(problem.seq_len),
                              static_cast<hsize_t>(heads_of(problem, tensor)), static_cast<hsize_t>(problem.head_dim)};
  const hid_t space = H5Screate_simple(4, extents, nullptr);
  const hid_t dataset = H5Dcreate2(file, name, H5T_IEEE_F32LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  REQUIRE(H5Dwrite(dataset, H5T_IEEE_F32LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, rows.data()) >= 0);
  H5Dclose(dataset);
  H5Sclose(space);
}

}  // namespace

TEST_CASE("every row of /dq, /dk and /dv is the oracle's, from 1 to 4 ranks and their grids") {
  for (const Case& each : cases()) {
    const Problem& problem = each.problem;
    const GradientRows oracle = oracle_gradients(*make_generator(problem, kSeed), problem, each.pattern, all_rows(problem),
                                                 {0, problem.kv_heads}, PlainProbabilities::kept, 1);
    for (std::int64_t ranks = 1; ranks <= 4; ++ranks) {
      std::vector<std::string> grids{"seq=" + std::to_string(ranks)};
      if (ranks == 4) { grids.emplace_back(problem.kv_heads >= 2 ? "heads=2" : "batch=2"); }
      for (const std::string& grid : grids) {
        INFO(each.name << " on " << ranks << " ranks, grid " << grid);
        const TemporaryFolder folder;
        const std::string path = folder / "out.h5";
        std::vector<std::string> command{ANNULUS_LAUNCH, std::to_string(ranks), ANNULUS_PROGRAM, "run", "--gradients", "--output", path};
        command.insert(command.end(), {"--grid", grid});
        command.insert(command.end(), each.flags.begin(), each.flags.end());
        const ProcessResult result = run_process(command, 60);
        INFO(result.err);
        REQUIRE(result.exit_code == 0);
        expect_gradients(path, problem, oracle);
      }
    }
  }
}

TEST_CASE("gradients are taken from /do of the input, which has the shape of /q") {
  const Problem problem{2, 23, 2, 1, 8, DType::fp32, true, 0.25};
  const auto source = make_generator(problem, 5);
  const TemporaryFolder folder;
  const std::string input = folder / "in.h5";
  const std::string output = folder / "out.h5";
  for (const Tensor of_dout : {Tensor::dout, Tensor::k}) {
    const hid_t file = H5Fcreate(input.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    write_values(file, "/q", *source, Tensor::q);
    write_values(file, "/k", *source, Tensor::k);
    write_values(file, "/v", *source, Tensor::v);
    write_values(file, "/do", *source, of_dout);
    H5Fclose(file);
    // Another seed than the values have: none of them is generated.
    const ProcessResult result = run_process({ANNULUS_LAUNCH, "2", ANNULUS_PROGRAM, "run", "--gradients", "--causal", "--scale", "0.25",
                                              "--seed", "9", "--input", input, "--output", output},
                                             60);
    INFO(result.err);
    if (of_dout == Tensor::k) {
      CHECK(result.exit_code == 2);
      CHECK(result.err.find("/do is fp32 [2, 23, 1, 8] and /q fp32 [2, 23, 2, 8]; they must be alike") != std::string::npos);
      continue;
    }
    REQUIRE(result.exit_code == 0);
    expect_gradients(output, problem,
                     oracle_gradients(*source, problem, dense_pattern(23), all_rows(problem), {0, 1}, PlainProbabilities::kept, 1));
  }
}
