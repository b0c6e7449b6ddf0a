// SPDX-License-Identifier: Apache-2.0
// A multihead layer as its users ask for it: flags and [layer], the result file, plans and refusals.
#include <annulus_test.hpp>

#include "../io/raw_dataset.hpp"
#include "process.hpp"
#include "program.hpp"

#include <cmath>
#include <cstddef>
#include <fstream>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

const std::string kSample = std::string(ANNULUS_TEST_DATA) + "/layer_sample.h5";

bool has_dataset(const std::string& path, const char* name) {
  const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  REQUIRE(file >= 0);
  const bool found = H5Lexists(file, name, H5P_DEFAULT) > 0;
  H5Fclose(file);
  return found;
}

void write_text(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

void expect_refusal(const std::vector<std::string>& arguments, const std::string& part) {
  const ProcessResult result = annulus_with(arguments);
  INFO(result.out << result.err);
  CHECK(result.exit_code == 2);
  CHECK_THAT(result.err, contains_text(part));
  CHECK(result.err.find('\n') == result.err.size() - 1);
}

}  // namespace

TEST_CASE("run writes y of a layer, on one rank and on three, as the model computed it") {
  const TemporaryFolder folder;
  const std::string path = folder / "y.h5";
  const std::vector<std::string> arguments{ANNULUS_PROGRAM, "run",      "--input",  kSample, "--layer.embed",
                                           "576",           "--causal", "--output", path};
  std::vector<std::string> command = arguments;
  if (GENERATE(1, 3) == 3) { command.insert(command.begin(), {ANNULUS_LAUNCH, "3"}); }

  const ProcessResult result = run_process(command, 60);

  INFO(result.out << result.err);
  REQUIRE(result.exit_code == 0);
  CHECK(result.out.find("layer: embed 576, rotary neighbouring (base 100000)\n") != std::string::npos);
  CHECK(result.out.find("ms for q, k and v") != std::string::npos);
  CHECK(!has_dataset(path, "/o"));
  CHECK(RawDataset(path, "/lse").extents == std::vector<hsize_t>{1, 9, 129});
  const RawDataset found(path, "/y");
  const RawDataset model(kSample, "/y");
  REQUIRE(found.extents == model.extents);
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < found.bytes.size() / sizeof(float); ++i) {
    const auto expected = static_cast<double>(model.as<float>()[i]);
    error += std::pow(static_cast<double>(found.as<float>()[i]) - expected, 2);
    norm += expected * expected;
  }
  CHECK(std::sqrt(error / norm) <= 1e-5);
}

TEST_CASE("check and bench hold a layer against fp64, with virtual ranks and another dtype too") {
  const ProcessResult checked =
      annulus_with({"check", "--input", kSample, "--layer.embed", "576", "--causal", "--virtual-ranks", "4", "--dtype", "bf16"});
  INFO(checked.out << checked.err);
  CHECK(checked.exit_code == 0);
  CHECK(checked.out.starts_with("PASS configured problem | rows 129/129"));
  // Without its rotary embedding it is another layer, and not what the file's y is; check has an oracle of its own and passes.
  CHECK(annulus_with({"check", "--input", kSample, "--layer.rotary", "none"}).exit_code == 0);
  CHECK(
      annulus_with({"bench", "--layer.embed", "40", "--seq-len", "300", "--heads", "2", "--repetitions", "2", "--warmup", "0"}).exit_code ==
      0);
}

TEST_CASE("[layer] is a section or flags, reads back, and an empty section is a layer") {
  const TemporaryFolder folder;
  write_text(folder / "a.toml", "seq-len = 70\nheads = 2\n[layer]\nqk-norm = \"rms\"\ngate = \"gelu\"\nembed = 11\n");
  const ProcessResult first = annulus_with({"run", "--config", folder / "a.toml", "--layer.gate-temperature", "2", "--print-config"});
  REQUIRE(first.exit_code == 0);
  CHECK(first.out.find("layer.qk-norm = \"rms\"\n") != std::string::npos);
  CHECK(first.out.find("layer.gate-temperature = 2.0\n") != std::string::npos);
  CHECK(first.out.find("layer.embed = 11\n") != std::string::npos);
  write_text(folder / "b.toml", first.out);
  CHECK(annulus_with({"run", "--config", folder / "b.toml", "--print-config"}).out == first.out);
  CHECK(annulus_with({"run", "--print-config"}).out.find("layer") == std::string::npos);
  // What the input's attributes say is not claimed before it is open.
  CHECK(annulus_with({"run", "--input", kSample, "--layer.gate", "none", "--print-config"}).out.find("rotary") == std::string::npos);

  write_text(folder / "empty.toml", "seq-len = 70\nheads = 2\n[layer]\n");
  const ProcessResult planned = annulus_with({"plan", "--config", folder / "empty.toml", "--ranks", "3"});
  CHECK(planned.exit_code == 0);
  CHECK(planned.out.find("layer: embed 128\n") != std::string::npos);
  CHECK(planned.out.find("layer of the largest rank: 256.00 KiB of weights, 24.00 KiB of activations") != std::string::npos);
}

TEST_CASE("what a layer does not take is refused with exit code 2, in one sentence") {
  const TemporaryFolder folder;
  write_text(folder / "bad.toml", "[layer]\nrotary = \"third\"\n");
  expect_refusal({"plan", "--config", folder / "bad.toml"}, "bad.toml:2: --layer.rotary third is not one of none, neighbouring, half");
  write_text(folder / "unknown.toml", "[layer]\ndropout = 0.1\n");
  expect_refusal({"plan", "--config", folder / "unknown.toml"}, "unknown.toml:2: unknown key layer.dropout");
  write_text(folder / "value.toml", "layer = true\n");
  expect_refusal({"plan", "--config", folder / "value.toml"}, "unknown key layer");
  expect_refusal({"plan", "--layer.rotary", "half", "--head-dim", "7"}, "head-dim 7 is odd");
  expect_refusal({"plan", "--layer.embed", "8", "--order", "hilbert"}, "--order is hilbert");
  expect_refusal({"plan", "--layer.embed", "0"}, "--layer.embed 0 is below 1");
  expect_refusal({"run", "--input", kSample}, "has no dataset /q");
  expect_refusal({"run", "--input", kSample, "--layer.embed", "577"}, "--layer.embed 577 contradicts the input file");
  expect_refusal({"run", "--input", kSample, "--layer.bias"}, "--layer.bias true contradicts the input file");
  expect_refusal({"run", "--input", kSample, "--layer.gate", "relu"}, "--layer.gate relu needs /wg");
  expect_refusal({"run", "--input", kSample, "--layer.bias-kv"}, "--layer.bias-kv true contradicts the input file");
  expect_refusal({"plan", "--layer.zero-tokens", "-1"}, "--layer.zero-tokens -1 is below 0");
  expect_refusal({"run", "--input", std::string(ANNULUS_TEST_DATA) + "/attention_sample.h5", "--layer.rotary", "half"},
                 "has no dataset /x");
  expect_refusal({"check", "--cases", "2", "--layer.embed", "8"}, "a layer is configured");
}
