// SPDX-License-Identifier: Apache-2.0
// Results that are not numbers are written, counted and said.
#include <annulus_test.hpp>

#include "io/hdf5_fixture.hpp"
#include "program.hpp"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

/// Q, K and V of `seq_len` rows, one head and two elements: Q and K are zero, so that a row is the mean of the V that it sees.
void write_input(const std::string& path, hsize_t seq_len, const std::vector<float>& v) {
  FileWriter writer(path);
  const std::vector<float> zeros(2 * seq_len, 0.0F);
  writer.dataset("/q", H5T_IEEE_F32LE, {1, seq_len, 1, 2}, zeros.data());
  writer.dataset("/k", H5T_IEEE_F32LE, {1, seq_len, 1, 2}, zeros.data());
  writer.dataset("/v", H5T_IEEE_F32LE, {1, seq_len, 1, 2}, v.data());
}

std::int64_t number_in(const std::string& path, const std::string& dataset) { return RawDataset(path, dataset).as<std::int64_t>()[0]; }

/// Each on one process, on virtual ranks and on processes.
std::vector<ProcessResult> run_everywhere(const std::vector<std::string>& arguments) {
  std::vector<std::string> virtually = arguments;
  virtually.insert(virtually.end(), {"--virtual-ranks", "3"});
  return {annulus_with(arguments), annulus_with(virtually), launch_annulus(2, arguments), launch_annulus(3, arguments)};
}

}  // namespace

TEST_CASE("a result of nothing but NaN is written, counted in report and file, and ends with exit code 1") {
  const TemporaryFolder folder;
  const std::string path = folder / "n.h5";
  for (const ProcessResult& result :
       run_everywhere({"run", "--seq-len", "20", "--heads", "1", "--threads", "1", "--scale", "1e300", "--force", "--output", path})) {
    INFO(result.out << result.err);
    CHECK(result.exit_code == 1);
    CHECK(result.out.find("20 rows of the result are not finite, the first at [0,0,0] (batch, head, row)\n") != std::string::npos);
    CHECK(result.err.find("annulus: 20 rows of the result are not finite") != std::string::npos);
    CHECK(result.out.find("wrote ") != std::string::npos);
    CHECK(number_in(path, "/rows/non_finite") == 20);
    CHECK(number_in(path, "/rows/uncovered") == 0);
    CHECK(RawDataset(path, "/rows/first_non_finite").extents == std::vector<hsize_t>{3});
    CHECK(folder.names().size() == 1);
  }
}

TEST_CASE("the running output is a sum: large values overflow it, from the first row that sees them on") {
  const TemporaryFolder folder;
  const std::string input = folder / "i.h5";
  std::vector<float> v(2 * 30, 1.0F);
  for (const std::size_t row : {11, 12}) { v[2 * row + 1] = 3e38F; }  // their sum is above the largest float, their mean is not
  write_input(input, 30, v);
  const std::string path = folder / "o.h5";
  for (const ProcessResult& result :
       run_everywhere({"run", "--input", input, "--causal", "--threads", "1", "--json", "--force", "--output", path})) {
    INFO(result.out << result.err);
    CHECK(result.exit_code == 1);
    CHECK(result.out.find("\"non_finite\": 18,") != std::string::npos);
    const RawDataset first(path, "/rows/first_non_finite");
    CHECK(std::vector<std::int64_t>(first.as<std::int64_t>(), first.as<std::int64_t>() + 3) == std::vector<std::int64_t>{0, 0, 12});
  }
}

TEST_CASE("the first row that is not finite is named as it stands in the input, whatever the order of the sequence") {
  const TemporaryFolder folder;
  const std::string input = folder / "i.h5";
  std::vector<float> v(2 * 16, 1.0F);
  for (const std::size_t row : {2, 3}) { v[2 * row + 1] = 3e38F; }
  write_input(input, 16, v);
  const std::string path = folder / "o.h5";
  // Along the curve the last segment is {7, 6, 2, 3}.
  for (const ProcessResult& result : run_everywhere({"run", "--input", input, "--segment-lengths", "4", "--order", "hilbert", "--threads",
                                                     "1", "--json", "--force", "--output", path})) {
    INFO(result.out << result.err);
    CHECK(result.exit_code == 1);
    CHECK(number_in(path, "/rows/non_finite") == 4);
    const RawDataset first(path, "/rows/first_non_finite");
    CHECK(std::vector<std::int64_t>(first.as<std::int64_t>(), first.as<std::int64_t>() + 3) == std::vector<std::int64_t>{0, 0, 2});
    const RawDataset out(path, "/o");
    for (const std::size_t row : {2, 3, 6, 7}) { CHECK(std::isinf(out.as<float>()[2 * row + 1])); }
    for (const std::size_t row : {1, 4, 5, 8, 15}) { CHECK(out.as<float>()[2 * row + 1] == 1.0F); }
  }
}

TEST_CASE("a row whose only key has the score minus infinity is not taken for one that no branch covers") {
  // One key a row: whatever the sign of its score, the softmax of infinity is no number.
  const ProcessResult result =
      annulus_with({"run", "--seq-len", "40", "--segment-lengths", "1", "--heads", "2", "--threads", "1", "--scale", "-1e300", "--json"});
  CHECK(result.exit_code == 1);
  CHECK(result.out.find("\"uncovered\": 0,") != std::string::npos);
  CHECK(result.out.find("\"non_finite\": 80,") != std::string::npos);
}

TEST_CASE("the share of the softmax that keys of zeros took is reported and stored for each branch") {
  const TemporaryFolder folder;
  const std::string path = folder / "z.h5";
  // All scores are 0. Branch 0: of five rows the last sees itself and three zeros. Branch 1, every row of one segment: none.
  for (const ProcessResult& result : run_everywhere(
           {"run", "--seq-len",        "5",   "--heads",  "2",         "--head-dim", "8", "--scale", "0",        "--segment-lengths",
            "4,5", "--dilation-rates", "1,1", "--ragged", "zero-keys", "--threads",  "1", "--force", "--output", path})) {
    INFO(result.out << result.err);
    CHECK(result.exit_code == 0);
    CHECK(result.out.find("keys of zeros took of the softmax, by branch: 15.00%, 0.00%\n") != std::string::npos);
    const RawDataset shares(path, "/rows/zero_key_shares");
    REQUIRE(shares.extents == std::vector<hsize_t>{2});
    CHECK(std::abs(shares.as<double>()[0] - 0.15) < 1e-6);
    CHECK(shares.as<double>()[1] == 0);
  }
}

TEST_CASE("a finite result says that it is, and rows that no branch covers are not counted as wrong") {
  const TemporaryFolder folder;
  const std::string path = folder / "o.h5";
  for (const ProcessResult& result : run_everywhere({"run", "--seq-len", "40", "--segment-lengths", "8", "--dilation-rates", "4", "--heads",
                                                     "2", "--head-dim", "8", "--threads", "1", "--json", "--force", "--output", path})) {
    INFO(result.out << result.err);
    CHECK(result.exit_code == 0);
    CHECK(result.out.find("\"uncovered\": 60,") != std::string::npos);
    CHECK(result.out.find("\"non_finite\": 0,") != std::string::npos);
    CHECK(result.out.find("first_non_finite") == std::string::npos);
    CHECK(number_in(path, "/rows/uncovered") == 60);
    CHECK(number_in(path, "/rows/non_finite") == 0);
  }
}
