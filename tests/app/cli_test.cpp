// SPDX-License-Identifier: Apache-2.0
#include <annulus_test.hpp>

#include "process.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <signal.h>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

ProcessResult annulus_with(std::vector<std::string> arguments, const std::vector<std::string>& environment = {}, double limit_s = 60) {
  arguments.insert(arguments.begin(), ANNULUS_PROGRAM);
  return run_process(arguments, limit_s, environment);
}

void expect_refusal(const std::vector<std::string>& arguments, const std::string& part) {
  const ProcessResult result = annulus_with(arguments);
  std::string line;
  for (const std::string& argument : arguments) { line += argument + " "; }
  INFO(line << "\n" << result.out << result.err);
  CHECK(result.exit_code == 2);
  CHECK(result.err.find(part) != std::string::npos);
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  CHECK(result.out.empty());
}

void write_text(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

const std::vector<std::string> kSmall{"--seq-len", "64", "--heads", "2", "--head-dim", "8", "--threads", "1"};

std::vector<std::string> with_small(std::string command, std::vector<std::string> more = {}) {
  std::vector<std::string> arguments{std::move(command)};
  arguments.insert(arguments.end(), kSmall.begin(), kSmall.end());
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

}  // namespace

TEST_CASE("every option out of range is refused with one sentence and exit code 2") {
  const std::vector<std::vector<std::string>> wrong{
      {"batch", "0", "below 1"},
      {"seq-len", "0", "below 1"},
      {"seq-len", "-5", "below 1"},
      {"seq-len", "99999999999999999999", "out of range"},
      {"seq-len", "010", "not a decimal integer"},
      {"seq-len", "0x10", "not a decimal integer"},
      {"seq-len", "1e3", "not a decimal integer"},
      {"seq-len", "ten", "not a decimal integer"},
      {"seq-len", "", "not a decimal integer"},
      {"heads", "0", "below 1"},
      {"kv-heads", "0", "below 1"},
      {"kv-heads", "3", "does not divide"},
      {"head-dim", "0", "below 1"},
      {"head-dim", "257", "above 256"},
      {"dtype", "fp64", "not one of fp32, fp16, bf16"},
      {"causal", "maybe", "neither true nor false"},
      {"scale", "nan", "not a finite number"},
      {"scale", "inf", "not a finite number"},
      {"scale", "x", "not a finite number"},
      {"seed", "-1", "below 0"},
      {"segment-lengths", "1,,2", "has a hole"},
      {"segment-lengths", "1,2,", "has a hole"},
      {"segment-lengths", "0", "below 1"},
      {"segment-lengths", "4,x", "not a decimal integer"},
      {"dilation-rates", "2", "needs --segment-lengths"},
      {"offset", "random", "not one of group"},
      {"head-split", "none", "not one of first"},
      {"mixing", "max", "not one of lse"},
      {"ragged", "wrap", "not one of short"},
      {"scale-by-branches", "2", "neither true nor false"},
      {"partition", "zigzag", "not one of contiguous"},
      {"schedule", "allgather", "not one of ring"},
      {"transport", "tcp", "not one of auto"},
      {"backend", "tpu", "not one of reference"},
      {"kernel", "fused", "not one of cublas"},
      {"tile-rows", "0", "below 1"},
      {"threads", "0", "below 1"},
      {"threads", "5000", "above 4096"},
      {"virtual-ranks", "0", "below 1"},
      {"virtual-ranks", "5000", "above 4096"},
      {"share-gpu", "3", "neither true nor false"},
      {"timeout", "-1", "negative"},
      {"timeout", "nan", "not a finite number"},
      {"input", "", "is empty"},
  };
  for (const auto& entry : wrong) { expect_refusal({"run", "--" + entry[0], entry[1]}, entry[2]); }
  expect_refusal({"run", "--segment-lengths", "4,8", "--dilation-rates", "1"}, "one for each branch");
  expect_refusal({"check", "--rows", "0"}, "below 1");
  expect_refusal({"check", "--cases", "0"}, "below 1");
  expect_refusal({"bench", "--repetitions", "0"}, "below 1");
  expect_refusal({"bench", "--warmup", "-1"}, "below 0");
  expect_refusal({"plan", "--ranks", "0"}, "below 1");
  expect_refusal({"generate"}, "--output");
}

TEST_CASE("unknown flags, commands and presets are refused") {
  expect_refusal({"run", "--sequence", "5"}, "--sequence");
  expect_refusal({"plan", "--virtual-ranks", "4"}, "--virtual-ranks");
  expect_refusal({"dance"}, "dance");
  expect_refusal({}, "subcommand");
  expect_refusal({"run", "--preset", "nonsense"}, "longnet");
  expect_refusal({"run", "--config", "/nonexistent.toml"}, "/nonexistent.toml");
  expect_refusal({"run", "--heads"}, "--heads");
}

TEST_CASE("configuration files are strict: unknown keys, wrong types and broken syntax name file and line") {
  const TemporaryFolder folder;
  const std::string path = folder / "config.toml";
  const auto refuse = [&](const std::string& text, const std::string& part) {
    write_text(path, text);
    expect_refusal({"run", "--config", path}, part);
  };
  refuse("heads = 4\nseqlen = 5\n", "config.toml:2: unknown key seqlen");
  refuse("heads = \"four\"\n", "config.toml:1: heads is not an integer");
  refuse("heads = 4.0\n", "heads is not an integer");
  refuse("heads = 0\n", "below 1");
  refuse("causal = 1\n", "neither true nor false");
  refuse("scale = nan\n", "finite");
  refuse("segment-lengths = [1, \"x\"]\n", "list of integers");
  refuse("segment-lengths = 4\n", "list of integers");
  refuse("dtype = 16\n", "not a string");
  refuse("heads = = 3\n", "config.toml:1");
  refuse("heads = 99999999999999999999\n", "config.toml:1");
}

TEST_CASE("--print-config reads back to the same configuration, and preset < file < flag") {
  const TemporaryFolder folder;
  write_text(folder / "a.toml", "heads = 6\nkv-heads = 3\nmixing = \"sum\"\nscale = 0.3\nseed = 9\n");
  const ProcessResult first = annulus_with({"run", "--preset", "longnet", "--config", folder / "a.toml", "--heads", "12", "--causal",
                                            "--dtype", "bf16", "--timeout", "7.5", "--print-config"});
  REQUIRE(first.exit_code == 0);
  CHECK(first.out.find("segment-lengths = [2048, 4096, 8192, 16384]") != std::string::npos);
  CHECK(first.out.find("mixing = \"sum\"") != std::string::npos);  // the file's, over the preset's lse
  CHECK(first.out.find("heads = 12") != std::string::npos);        // the flag's, over the file's
  CHECK(first.out.find("scale = 0.3\n") != std::string::npos);
  CHECK(first.out.find("causal = true") != std::string::npos);
  write_text(folder / "b.toml", first.out);
  const ProcessResult second = annulus_with({"run", "--config", folder / "b.toml", "--print-config"});
  REQUIRE(second.exit_code == 0);
  CHECK(second.out == first.out);
}

TEST_CASE("help, plan and print-config work inside a batch script, where no launcher is") {
  const std::vector<std::string> batch{"SLURM_JOB_ID=77",
                                       "SLURM_JOBID=77",
                                       "SLURM_NTASKS=64",
                                       "SLURM_NPROCS=64",
                                       "SLURM_NNODES=8",
                                       "SLURM_PROCID=0",
                                       "SLURM_LOCALID=0",
                                       "SLURM_NODEID=0",
                                       "SLURM_TASKS_PER_NODE=8(x8)",
                                       "SLURM_JOB_NODELIST=node[1-8]",
                                       "SLURM_NODELIST=node[1-8]"};
  CHECK(annulus_with({"--help"}, batch).exit_code == 0);
  CHECK(annulus_with({"run", "--help"}, batch).out.find("--segment-lengths") != std::string::npos);
  CHECK(annulus_with({"run", "--preset", "longnet", "--print-config"}, batch).exit_code == 0);
  const ProcessResult plan = annulus_with({"plan", "--ranks", "64", "--seq-len", "1048576"}, batch);
  CHECK(plan.exit_code == 0);
  CHECK(plan.out.find("64 ranks") != std::string::npos);
  CHECK(annulus_with({"info"}, batch).exit_code == 0);
}

TEST_CASE("a world of one process in a Slurm step of more tasks is refused, naming --mpi=pmix") {
  const ProcessResult result =
      annulus_with(with_small("run"), {"SLURM_JOB_ID=77", "SLURM_STEP_ID=0", "SLURM_STEP_NUM_TASKS=4", "SLURM_PROCID=1"});
  CHECK(result.exit_code == 2);
  CHECK(result.err.find("--mpi=pmix") != std::string::npos);
}

TEST_CASE("backends and transports that are not in this binary say what is") {
#if ANNULUS_TEST_HAS_CUDA
  expect_refusal(with_small("run", {"--transport", "nccl"}), "backend cpu has none");
#else
  expect_refusal(with_small("run", {"--backend", "cuda"}), "is not compiled into this binary");
  expect_refusal(with_small("run", {"--backend", "cuda"}), "reference");
  expect_refusal(with_small("run", {"--transport", "nccl"}), "nccl");
#endif
}

TEST_CASE("a check that passes exits 0, on one rank, on virtual ranks and on processes") {
  CHECK(annulus_with(with_small("check")).exit_code == 0);
  CHECK(annulus_with(with_small("check", {"--virtual-ranks", "5", "--causal"})).exit_code == 0);
  std::vector<std::string> launched{ANNULUS_LAUNCH, "3", ANNULUS_PROGRAM};
  for (const std::string& argument : with_small("check", {"--dtype", "bf16"})) { launched.push_back(argument); }
  const ProcessResult result = run_process(launched, 60);
  INFO(result.err);
  CHECK(result.exit_code == 0);
  CHECK(result.out.find("PASS") != std::string::npos);
  CHECK(std::count(result.out.begin(), result.out.end(), '\n') == 1);
}

TEST_CASE("mistakes under a launcher are told once, by one rank, with exit code 2") {
  const TemporaryFolder folder;
  write_text(folder / "x.h5", "not HDF5");
  const auto launch = [&](const std::vector<std::string>& arguments, const std::string& part) {
    std::vector<std::string> all{ANNULUS_LAUNCH, "3", ANNULUS_PROGRAM};
    all.insert(all.end(), arguments.begin(), arguments.end());
    const ProcessResult result = run_process(all, 60);
    INFO(result.err);
    CHECK(result.exit_code == 2);
    const std::size_t first = result.err.find(part);
    CHECK(first != std::string::npos);
    CHECK(result.err.find(part, first + 1) == std::string::npos);
  };
  launch({"run", "--input", folder / "x.h5"}, "x.h5");
  launch({"run", "--input", folder / "absent.h5"}, "absent.h5");
  launch({"run", "--heads", "0"}, "--heads 0 is below 1");
  launch(with_small("run", {"--virtual-ranks", "2"}), "runs in one process");
  launch(with_small("run", {"--output", folder.path() + "/no/such/folder/out.h5"}), "No such file or directory");
  launch(with_small("check", {"--cases", "3", "--input", folder / "x.h5"}), "takes no --input");
}

TEST_CASE("run writes one complete file and refuses to replace it without --force") {
  const TemporaryFolder folder;
  const std::string path = folder / "out.h5";
  REQUIRE(annulus_with(with_small("run", {"--output", path})).exit_code == 0);
  CHECK(std::filesystem::exists(path));
  expect_refusal(with_small("run", {"--output", path}), "--force");
  CHECK(annulus_with(with_small("run", {"--output", path, "--force"})).exit_code == 0);
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), std::filesystem::directory_iterator{}) == 1);
}

TEST_CASE("generate writes what run and check then read, the same for any number of ranks") {
  const TemporaryFolder folder;
  const std::string path = folder / "input.h5";
  REQUIRE(annulus_with(
              {"generate", "--seq-len", "100", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "bf16", "--output", path})
              .exit_code == 0);
  const ProcessResult result = annulus_with({"check", "--input", path, "--virtual-ranks", "3", "--threads", "1"});
  INFO(result.err);
  CHECK(result.exit_code == 0);
  expect_refusal({"run", "--input", path, "--heads", "8"}, "contradicts");
  CHECK(annulus_with({"check", "--input", path, "--dtype", "fp32", "--threads", "1"}).exit_code == 0);
}

TEST_CASE("a terminated run leaves no file behind") {
  const TemporaryFolder folder;
  const std::string path = folder / "out.h5";
  bool sent = false;
  const ProcessResult result = run_process(
      {ANNULUS_PROGRAM, "run", "--seq-len", "200000", "--segment-lengths", "64", "--heads", "8", "--head-dim", "128", "--output", path}, 60,
      {}, [&](pid_t pid) {
        if (!sent && !std::filesystem::is_empty(folder.path())) {
          kill(pid, SIGTERM);
          sent = true;
        }
      });
  INFO(result.err);
  CHECK((result.exit_code == 128 + SIGTERM || result.exit_code == 0));
  if (result.exit_code != 0) { CHECK(std::filesystem::is_empty(folder.path())); }
}

TEST_CASE("--json prints one JSON document") {
  for (const char* command : {"run", "check", "plan", "info"}) {
    std::vector<std::string> arguments = std::string(command) == "info"
                                             ? std::vector<std::string>{command}
                                             : std::vector<std::string>{command, "--seq-len", "64", "--heads", "2", "--head-dim", "8"};
    arguments.emplace_back("--json");
    const ProcessResult result = annulus_with(arguments);
    INFO(command << result.err);
    CHECK(result.exit_code == 0);
    CHECK(result.out.starts_with("{"));
    CHECK(result.out.ends_with("}\n"));
  }
}
