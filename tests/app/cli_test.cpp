// SPDX-License-Identifier: Apache-2.0
#include <annulus_test.hpp>

#include "program.hpp"
#include "text_file.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <signal.h>
#include <sstream>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

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

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) { lines.push_back(line); }
  return lines;
}

/// The words of each line that is not a comment: header and rows of a table.
std::vector<std::vector<std::string>> rows_of(const std::string& text) {
  std::vector<std::vector<std::string>> rows;
  for (const std::string& line : lines_of(text)) {
    if (line.starts_with("#")) { continue; }
    std::istringstream stream(line);
    auto& words = rows.emplace_back();
    for (std::string word; stream >> word;) { words.push_back(word); }
  }
  return rows;
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
      {"kv-lengths", "0", "kv-lengths: 0 is outside 1..8192"},
      {"kv-lengths", "5,6", "kv-lengths has 2 numbers, and batch is 1"},
      {"kv-lengths", "8193", "outside 1..8192"},
      {"extra-keys", "-1", "below 0"},
      {"extra-keys", "16777217", "above 16777216"},
      {"dropout", "1", "dropout 1 is outside [0, 1)"},
      {"dropout", "-0.1", "dropout -0.1 is outside [0, 1)"},
      {"dropout", "nan", "not a finite number"},
      {"dropout-seed", "-1", "below 0"},
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
      {"ragged", "wraps", "not one of short, wrap, truncate, dense-tail, zero-keys, reject"},
      {"tile-order", "random", "not one of linear, hilbert"},
      {"order", "random", "not one of linear, hilbert, hilbert-inverse, bit-reversal"},
      {"scale-by-branches", "2", "neither true nor false"},
      {"partition", "blocks", "not one of auto, contiguous, zigzag, striped"},
      {"schedule", "random", "not one of auto, ring, ring-full, direct, allgather"},
      {"transport", "tcp", "not one of auto"},
      {"backend", "tpu", "not one of reference"},
      {"kernel", "fast", "not one of auto, cublas, fused"},
      {"kernel", "fused", "--kernel fused is one of backend cuda, and this is backend cpu"},
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
  expect_refusal({"run", "--ragged", "reject", "--seq-len", "64", "--segment-lengths", "16", "--dilation-rates", "3"},
                 "rate 3 does not divide");
  expect_refusal({"plan", "--ragged", "reject", "--seq-len", "60", "--segment-lengths", "16"}, "16 does not divide seq-len 60");
  for (const std::string command : {"run", "check", "bench", "plan"}) {
    expect_refusal({command, "--order", "hilbert", "--causal"}, "--order hilbert moves later tokens before earlier ones");
  }
  expect_refusal({"run", "--partition", "zigzag", "--key-order", "cyclic"}, "needs --causal and --schedule direct or allgather");
  expect_refusal({"run", "--partition", "striped", "--causal", "--key-order", "cyclic"}, "every rank has rows of each block of keys");
  expect_refusal({"run", "--partition", "striped", "--layer.embed", "16"}, "a layer projects rows that are neighbours");
  expect_refusal({"run", "--ragged", "zero-keys", "--kv-lengths", "5"}, "cannot have kv-lengths");
  expect_refusal({"run", "--order", "hilbert", "--kv-lengths", "5"}, "so that kv-lengths cannot hide them");
  expect_refusal({"check", "--rows", "0"}, "below 1");
  expect_refusal({"check", "--cases", "0"}, "below 1");
  expect_refusal({"bench", "--repetitions", "0"}, "below 1");
  expect_refusal({"bench", "--warmup", "-1"}, "below 0");
  expect_refusal({"plan", "--ranks", "0"}, "below 1");
  expect_refusal({"generate"}, "--output");
}

TEST_CASE("a sweep that cannot be is refused, naming the sweep or its row, before any row runs") {
  const std::vector<std::vector<std::string>> wrong{
      {"heads=0,1", "--heads 0 is below 1"},
      {"heads=1,x", "--heads 'x' is not a decimal integer"},
      {"heads", "KEY=VALUE"},
      {"", "KEY=VALUE"},
      {"heads=", "has a hole"},
      {"heads=1,,2", "has a hole"},
      {"tokens=5", "there is no option tokens"},
      {"dtype=fp32,fp64", "--dtype fp64 is not one of"},
      {"causal=false,maybe", "neither true nor false"},
      {"scale=nan", "not a finite number"},
      {"segment-lengths=4", "holds a list"},
      {"sweep=heads", "holds a list"},
      {"timeout=1,2", "not an option of the problem"},
      {"repetitions=1,2", "not an option of the problem"},
      {"output=a,b", "not an option of the problem"},
      {"seq-len=8..64", "is not a range"},
      {"seq-len=64..8*2", "begins above its end"},
      {"seq-len=8..64*1", "does not grow"},
      {"seed=0..64*2", "does not grow"},
      {"seq-len=8..64+0", "does not grow"},
      {"seq-len=8..*2", "not a decimal integer"},
      {"seq-len=1..9000000000000000000+1", "more than 10000 values"},
      {"head-dim=128..512*2", "--head-dim 512 is above 256"},
      {"kv-heads=2,3", "row 2 of 2 (kv-heads 3): kv-heads 3 does not divide"},
      {"transport=self,nccl", "row 2 of 2 (transport nccl)"},
      {"seq-len=64,9000000000000", "row 2 of 2 (seq-len 9000000000000)"},
  };
  for (const auto& entry : wrong) {
    const std::vector<std::string> arguments{"bench", "--heads", "2", "--head-dim", "8", "--threads", "1", "--sweep", entry[0]};
    expect_refusal(arguments, entry[1]);
  }
  expect_refusal({"bench", "--sweep", "heads=1,2", "--sweep", "heads=4"}, "heads is swept twice");
  expect_refusal({"bench", "--sweep", "seq-len=1..200+1", "--sweep", "heads=1..200+1"}, "at most 10000");
  expect_refusal({"run", "--sweep", "heads=1,2"}, "--sweep");
}

TEST_CASE("--preset list names every preset with one line, and every preset plans") {
  const ProcessResult listed = annulus_with({"run", "--preset", "list"});
  CHECK(listed.exit_code == 0);
  CHECK(listed.err.empty());
  const std::vector<std::string> lines = lines_of(listed.out);
  CHECK(lines.size() >= 8);
  for (const std::string& line : lines) {
    INFO(line);
    CHECK(line.size() < 140);
    CHECK(line.ends_with("."));
    const std::string name = line.substr(0, line.find(' '));
    const ProcessResult planned = annulus_with({"plan", "--preset", name, "--seq-len", "100000", "--ranks", "3"});
    CHECK(planned.exit_code == 0);
    CHECK(planned.err.empty());
  }
  CHECK(listed.out.find("production ") != std::string::npos);
  CHECK(annulus_with({"run", "--preset", "dense-causal", "--seq-len", "2048", "--heads", "1", "--head-dim", "8", "--virtual-ranks", "2"})
            .out.find("partition zigzag, schedule direct") != std::string::npos);
}

TEST_CASE("--preset takes the names that users of the Python modules know, or says what replaces them") {
  const std::vector<std::string> rest{"--seq-len", "9000", "--heads", "7", "--ranks", "2"};
  const auto plan_of = [&](const std::string& preset) {
    std::vector<std::string> arguments{"plan", "--preset", preset};
    arguments.insert(arguments.end(), rest.begin(), rest.end());
    const ProcessResult planned = annulus_with(arguments);
    CHECK(planned.exit_code == 0);
    return planned.out;
  };
  CHECK(plan_of("RingDilatedAttentionProduction") == plan_of("production"));
  for (const char* name : {"RingDilatedAttentionHybrid", "RingDilatedAttentionTrue", "true"}) { CHECK(plan_of(name) == plan_of("hybrid")); }
  CHECK(plan_of("RingDilatedAttentionHilbertOptimized") == plan_of("hilbert-permuted"));
  CHECK(plan_of("RingMultiheadDilatedAttentionHybrid") == plan_of("multihead"));
  CHECK(plan_of("hilbert-permuted").find("order hilbert-inverse (another operator: the sequence is permuted)") != std::string::npos);
  CHECK(plan_of("hybrid") != plan_of("production"));
  CHECK(plan_of("hilbert").find("tiles of queries and keys along a hilbert curve") != std::string::npos);
  expect_refusal({"plan", "--preset", "hilbert", "--key-order", "cyclic"}, "--key-order cyclic and --tile-order hilbert are two orders");
  expect_refusal({"plan", "--preset", "hilbert-permuted", "--causal"}, "--causal has no meaning");
  expect_refusal({"plan", "--preset", "ring_dilated_attention_hilbert_refactored"}, "--order bit-reversal");
  expect_refusal({"plan", "--preset", "ring_dilated_attention_hybrid_fixed.py"}, "is preset hybrid-group-plus-segment");
  expect_refusal({"plan", "--preset", "RingDilatedAttentionV3"}, "preset production has its groups");
  expect_refusal({"plan", "--preset", "ring_dilated_attention_simple_triton"}, "--mixing mean");
  expect_refusal({"plan", "--preset", "TrueRingDilatedAttention"}, "preset dense is the ring");
  expect_refusal({"plan", "--preset", "RingDistributedDilatedAttention"}, "preset distributed is its attention");
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
  refuse("sweep = \"heads=1,2\"\n", "list of strings");
  refuse("sweep = [1]\n", "list of strings");
  refuse("batch = 1\nsweep = [\"heads=1,y\"]\n", "config.toml:2: --sweep 'heads=1,y': --heads 'y'");
  refuse("heads = = 3\n", "config.toml:1");
  refuse("heads = 99999999999999999999\n", "config.toml:1");
}

TEST_CASE("--print-config reads back to the same configuration, and preset < file < flag") {
  const TemporaryFolder folder;
  write_text(folder / "a.toml", "heads = 6\nkv-heads = 3\nmixing = \"sum\"\nscale = 0.3\nseed = 9\n");
  const ProcessResult first = annulus_with({"run", "--preset", "longnet-bench", "--config", folder / "a.toml", "--heads", "12", "--causal",
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
  CHECK(second.err.empty());
}

TEST_CASE("keys of another command in a file are not used, and that is said once") {
  const TemporaryFolder folder;
  const std::string path = folder / "job.toml";
  write_text(path, "seq-len = 64\nthreads = 1\nrepetitions = 2\nranks = 3\n");
  const ProcessResult plan = annulus_with({"plan", "--config", path});
  CHECK(plan.exit_code == 0);
  CHECK(plan.err == "annulus: " + path + ": plan does not use repetitions, threads\n");
  const ProcessResult launched = run_process({ANNULUS_LAUNCH, "3", ANNULUS_PROGRAM, "check", "--config", path}, 60);
  CHECK(launched.exit_code == 0);
  CHECK(launched.err.find("check does not use ranks, repetitions") != std::string::npos);
  CHECK(launched.err.find("does not use") == launched.err.rfind("does not use"));
}

TEST_CASE("an option beyond what counts can hold is refused under its own name") {
  expect_refusal({"plan", "--seq-len", "281474976710657", "--heads", "1", "--head-dim", "1"}, "seq-len 281474976710657 is beyond 2^48");
  expect_refusal({"plan", "--segment-lengths", "281474976710657"}, "segment-lengths: 281474976710657 is beyond 2^48");
  expect_refusal({"plan", "--segment-lengths", "8", "--dilation-rates", "281474976710657"},
                 "dilation-rates: 281474976710657 is beyond 2^48");
}

TEST_CASE("plan counts 2^64 pairs and more: FLOPs in the table, the sum and JSON are what they are") {
  const std::vector<std::string> long_problem{"plan", "--seq-len", "1073741824", "--heads", "16", "--ranks", "2"};
  const ProcessResult text = annulus_with(long_problem);
  CHECK(text.out.find("4.722e+12 GFLOP") != std::string::npos);
  std::vector<std::string> json = long_problem;
  json.emplace_back("--json");
  CHECK(annulus_with(json).out.find("\"flops\": 4.722366482869645e+21") != std::string::npos);
  const ProcessResult bytes = annulus_with({"plan", "--seq-len", "17592186044416", "--heads", "16", "--kv-heads", "16", "--head-dim", "256",
                                            "--dtype", "bf16", "--schedule", "ring-full", "--ranks", "128"});
  CHECK(bytes.out.find("all ranks: 36605257771267391488 bytes sent") != std::string::npos);
}

TEST_CASE("threads without the stack that kernels need are refused, and a library that ends the process does not pass for a failed check") {
  for (const char* size : {"OMP_STACKSIZE=16k", "OMP_STACKSIZE=64", "OMP_STACKSIZE=128k"}) {
    for (const char* command : {"run", "check", "bench"}) {
      const ProcessResult result = annulus_with({command, "--seq-len", "64", "--heads", "2", "--threads", "2"}, {size});
      INFO(size << " " << command << " " << result.err);
      CHECK((result.exit_code == 2 || result.exit_code == 3));
      CHECK(result.err.find("annulus: ") != std::string::npos);
    }
  }
  const ProcessResult small = annulus_with(with_small("check", {}), {"OMP_STACKSIZE=300k"});
  CHECK(small.exit_code == 0);  // one thread, which has the stack of the process
  const ProcessResult none = annulus_with({"check", "--seq-len", "64", "--threads", "64"}, {"OMP_STACKSIZE=1000000G"});
  INFO(none.err);
  CHECK(none.exit_code == 3);
  CHECK(none.err.find("annulus: a library has ended the process") != std::string::npos);
  const ProcessResult limited = run_process({"bash", "-c", "ulimit -s 300; exec \"$0\" run --threads 2 --seq-len 64", ANNULUS_PROGRAM}, 60);
  INFO(limited.err);
  CHECK(limited.exit_code == 2);
  CHECK(limited.err.find("ulimit -s") != std::string::npos);
}

TEST_CASE("file names that are not text are refused, and those that are come back as they were from files and JSON") {
  const TemporaryFolder folder;
  for (const char* command : {"run", "bench"}) {
    expect_refusal(with_small(command, {"--output", folder / "a\xff.h5"}), "a\\xff.h5' is not");
    expect_refusal(with_small(command, {"--output", folder / "a\xff.h5", "--print-config"}), "a\\xff.h5' is not");
    expect_refusal(with_small(command, {"--input", "caf\xe9.h5", "--json"}), "caf\\xe9.h5' is not");
  }
  expect_refusal(with_small("bench", {"--csv", "\xc3"}), "not");
  write_text(folder / "nul.toml", "output = \"o.h5\\u0000.tmp\"\n");
  expect_refusal({"run", "--config", folder / "nul.toml"}, "o.h5\\x00.tmp' is not a file name in UTF-8");
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), std::filesystem::directory_iterator{}) == 1);
  for (const std::string& name : {std::string("quote\"s'.h5"), std::string("back\\slash.h5"), std::string("tab\tnew\nline.h5"),
                                  std::string("\x01\x7f.h5"), std::string("caf\xc3\xa9 \xf0\x9f\x98\x80.h5"), std::string("# = [x].h5")}) {
    INFO(name);
    const ProcessResult printed = annulus_with(with_small("run", {"--output", folder / name, "--print-config"}));
    REQUIRE(printed.exit_code == 0);
    write_text(folder / "named.toml", printed.out);
    CHECK(annulus_with({"run", "--config", folder / "named.toml", "--print-config"}).out == printed.out);
    const ProcessResult ran = annulus_with({"run", "--config", folder / "named.toml", "--json"});
    INFO(ran.err);
    CHECK(ran.exit_code == 0);
    CHECK(std::filesystem::exists(folder / name));
  }
}

TEST_CASE("a sweep is part of the configuration: --print-config keeps it, and heads may vary under the default of kv-heads") {
  const TemporaryFolder folder;
  const ProcessResult first = annulus_with({"bench", "--sweep", "heads=2,3", "--sweep", "seq-len=16..64*2", "--print-config"});
  REQUIRE(first.exit_code == 0);
  CHECK(first.out.find("sweep = [\"heads=2,3\", \"seq-len=16..64*2\"]") != std::string::npos);
  CHECK(first.out.find("kv-heads") == std::string::npos);
  write_text(folder / "sweep.toml", first.out);
  CHECK(annulus_with({"bench", "--config", folder / "sweep.toml", "--print-config"}).out == first.out);
  const ProcessResult result = annulus_with({"bench", "--config", folder / "sweep.toml", "--repetitions", "1", "--threads", "1"});
  INFO(result.err);
  CHECK(result.exit_code == 0);
  CHECK(rows_of(result.out).size() == 7);
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

TEST_CASE("under every launcher the rank that it calls 0 speaks for commands that need no MPI, and the others are silent") {
  for (const std::string variable : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID"}) {
    for (const std::vector<std::string>& arguments : {std::vector<std::string>{"plan"}, {"--help"}, {"run", "--print-config"}}) {
      INFO(variable << " " << arguments.front());
      const ProcessResult first = annulus_with(arguments, {variable + "=0"});
      const ProcessResult second = annulus_with(arguments, {variable + "=1"});
      CHECK(first.exit_code == 0);
      CHECK_FALSE(first.out.empty());
      CHECK(second.exit_code == 0);
      CHECK(second.out.empty());
    }
  }
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

namespace {

const char* const kMachine =
    "name = \"two hosts\"\nranks-per-host = 2\nmemory-gib = 0.5\nlaunch-gap-us = 5\n[copy]\nbytes = [1048576]\nus = [100.0]\n"
    "[link-inside]\nbytes = [1024, 1048576]\nus = [2.0, 200.0]\n[link-between]\nbytes = [1024, 1048576]\nus = [20.0, 1000.0]\n"
    "[[block-rates]]\ndtype = \"fp32\"\nhead-dim = 64\nmask = \"none\"\nrows = [64, 1024]\ngflops = [50.0, 100.0]\n";

}  // namespace

TEST_CASE("plan with a machine says times, links inside and between hosts, the fastest way and what fits") {
  const TemporaryFolder folder;
  const std::string machine = folder / "machine.toml";
  const std::string csv = folder / "plan.csv";
  write_text(machine, kMachine);
  const std::vector<std::string> problem{"plan",       "--seq-len", "65536",    "--heads",   "4",
                                         "--head-dim", "64",        "--causal", "--machine", machine};
  const auto with = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = problem;
    arguments.insert(arguments.end(), more.begin(), more.end());
    return annulus_with(arguments);
  };

  const ProcessResult one = with({"--ranks", "4"});
  CHECK(one.exit_code == 0);
  CHECK(one.out.find("machine: two hosts") != std::string::npos);
  CHECK(one.out.find("between 2 hosts") != std::string::npos);
  CHECK(one.out.find("predicted: ") != std::string::npos);
  CHECK(one.out.find("4 of 4 ranks ran on the clock") != std::string::npos);
  CHECK(one.out.find("fastest of ") != std::string::npos);
  CHECK(one.out.find("longest sequence that fits in 512.00 MiB: ") != std::string::npos);

  const ProcessResult several = with({"--ranks", "1,2,4,...,16,24", "--csv", csv});
  CHECK(several.exit_code == 0);
  CHECK(several.out.find("refused: rank 0 needs ") == std::string::npos);
  const std::vector<std::string> lines = lines_of(read_text(csv));
  REQUIRE(lines.size() == 7);
  CHECK(lines[0].starts_with("ranks,seq-len,grid,"));
  for (const auto& [number, ranks] : std::vector<std::pair<std::size_t, std::string>>{{1, "1,"}, {4, "8,"}, {5, "16,"}, {6, "24,"}}) {
    CHECK(lines[number].starts_with(ranks + "65536,"));
  }

  // Of 96 KiB tokens one rank needs more than half a GiB, and two ranks do not.
  const ProcessResult too_long =
      annulus_with({"plan", "--seq-len", "393216", "--heads", "4", "--head-dim", "64", "--causal", "--machine", machine, "--ranks", "1,2"});
  CHECK(too_long.exit_code == 0);
  CHECK(too_long.out.find("refused: rank 0 needs ") != std::string::npos);
  const ProcessResult uneven = with({"--ranks", "2,3", "--grid", "heads=2"});
  CHECK(uneven.exit_code == 0);
  CHECK(uneven.out.find("3 refused: ") != std::string::npos);

  const ProcessResult json = with({"--ranks", "1,2", "--json"});
  CHECK(json.exit_code == 0);
  for (const char* key : {"\"predicted\"", "\"total_ms\"", "\"bytes_between_hosts\"", "\"fastest\"", "\"longest_seq_len\""}) {
    CHECK(json.out.find(key) != std::string::npos);
  }
}

TEST_CASE("bench --calibrate measures a machine, by which bench and plan then predict") {
  const TemporaryFolder folder;
  const std::string machine = folder / "here.toml";
  const ProcessResult measured = annulus_with({"bench", "--calibrate", machine, "--heads", "1", "--head-dim", "16", "--threads", "1"});
  CHECK(measured.exit_code == 0);
  CHECK(measured.out.find("[[block-rates]]") != std::string::npos);
  const std::string text = read_text(machine);
  for (const char* key : {"launch-gap-us = ", "[copy]", "mask = \"causal\"", "rows = [32, 64, 128"}) {
    CHECK(text.find(key) != std::string::npos);
  }

  const ProcessResult timed = annulus_with({"bench", "--seq-len", "512", "--heads", "1", "--head-dim", "16", "--threads", "1",
                                            "--virtual-ranks", "2", "--repetitions", "3", "--machine", machine, "--json"});
  CHECK(timed.exit_code == 0);
  CHECK(timed.out.find("\"predicted_ms\": 0.0,") == std::string::npos);
  CHECK(timed.out.find("\"prediction_error\": ") != std::string::npos);
  const ProcessResult planned = annulus_with({"plan", "--seq-len", "512", "--heads", "1", "--head-dim", "16", "--machine", machine});
  CHECK(planned.exit_code == 0);
  CHECK(planned.out.find("predicted: ") != std::string::npos);

  expect_refusal({"bench", "--calibrate", machine}, "exists");
  expect_refusal({"bench", "--calibrate", folder / "other.toml", "--sweep", "heads=1,2"}, "takes no --sweep");
}

TEST_CASE("wrong machine files and numbers of ranks are refused with the place") {
  const TemporaryFolder folder;
  const std::string machine = folder / "machine.toml";
  const auto refuses = [&](const std::string& text, const std::string& part) {
    write_text(machine, text);
    expect_refusal({"plan", "--seq-len", "64", "--ranks", "2", "--machine", machine}, part);
  };
  const std::string good = kMachine;
  refuses("speed = 3\n" + good, machine + ":1: unknown key speed");
  refuses(good + "colour = 1\n", "unknown key colour");
  refuses("ranks-per-host = 0\n" + good.substr(good.find("memory-gib")), "ranks-per-host 0 is below 1");
  refuses(good.substr(0, good.find("[[block-rates]]")), "block rates are missing");
  refuses("transfers = \"by-magic\"\n" + good, "not one of beside-work, in-wait");
  refuses("lanes = true\n" + good, "lanes is not an integer");
  refuses(good.substr(0, good.find("gflops")) + "gflops = [1.0]\n", "2 numbers of rows and 1 of gflops");
  refuses(good.substr(0, good.find("gflops")) + "gflops = [1.0, -2.0]\n", "neither may be 0 or less");
  refuses("name = 'a", machine + ":1:");
  expect_refusal({"plan", "--machine", folder / "absent.toml"}, "absent.toml");
  write_text(machine, good);
  expect_refusal({"plan", "--seq-len", "64", "--dtype", "bf16", "--machine", machine}, "has no block rates of bf16");
  for (const char* command : {"plan", "bench"}) {
    expect_refusal({command, "--seq-len", "64", "--gradients", "--machine", machine}, "--machine predicts no time of a backward pass");
  }
  expect_refusal({"plan", "--ranks", "4,...,16"}, "fewer than two numbers before the dots");
  expect_refusal({"plan", "--ranks", "1,2,...,9"}, "does not come to 9");
  expect_refusal({"plan", "--ranks", "4,2,...,8"}, "does not ascend");
  expect_refusal({"plan", "--ranks", "1,,2"}, "has a hole");
}

TEST_CASE("the machine files that come with the program are read, and plan 4,096 ranks of 2^30 tokens in seconds") {
  for (const auto& entry : std::filesystem::directory_iterator(ANNULUS_MACHINES)) {
    if (entry.path().extension() != ".toml") { continue; }
    INFO(entry.path());
    const ProcessResult result =
        annulus_with({"plan", "--machine", entry.path().string(), "--seq-len", "1073741824", "--heads", "16", "--head-dim", "128",
                      "--dtype", entry.path().stem().string().starts_with("cpu") ? "fp32" : "bf16", "--causal", "--ranks", "4096"});
    CHECK(result.exit_code == 0);
    CHECK(result.err.empty());
    CHECK(result.out.find("predicted: ") != std::string::npos);
  }
}

TEST_CASE("a grid that does not fit ranks, batch or heads is refused, and plan counts its rings") {
  const auto plan = [](const std::string& grid, const std::string& ranks) {
    return std::vector<std::string>{"plan", "--seq-len", "300", "--heads", "6", "--kv-heads", "2", "--ranks", ranks, "--grid", grid};
  };
  expect_refusal(plan("heads=4", "6"), "6 ranks are not divisible into 4 rings");
  expect_refusal(plan("heads=7", "7"), "the problem has 6 heads");
  expect_refusal(plan("batch=2", "2"), "the batch has 1 entry");
  expect_refusal(plan("heads=2,seq=2", "6"), "has 4 places, and there are 6 ranks");
  expect_refusal(plan("heads", "4"), "'heads' is not auto, batch=N, heads=N or seq=N");

  // Each KV head is kept by two rings of two ranks, which send each other a block of 150 rows.
  const std::int64_t block = std::int64_t{2} * 150 * 64 * 4;
  const ProcessResult result = annulus_with(plan("heads=4", "8"));
  INFO(result.out << result.err);
  CHECK(result.out.find("8 ranks as batch=1,heads=4,seq=2") != std::string::npos);
  CHECK(result.out.find("all ranks: " + std::to_string(8 * block) + " bytes sent") != std::string::npos);
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

TEST_CASE("a problem beyond the memory is refused with the numbers before anything is read, made or allocated") {
  // 4 T values for each of Q, K and V: whatever touches them all cannot answer within the limit.
  const std::vector<std::string> huge{"--seq-len", "2000000000", "--heads", "16", "--head-dim", "128", "--threads", "1"};
  const auto refused = [&](std::vector<std::string> arguments, const std::vector<std::string>& more) {
    arguments.insert(arguments.end(), huge.begin(), huge.end());
    arguments.insert(arguments.end(), more.begin(), more.end());
    const ProcessResult result = run_process(arguments, 20);
    INFO(result.err);
    CHECK_FALSE(result.timed_out);
    CHECK(result.exit_code == 2);
    CHECK(result.err.find("bytes by plan and") != std::string::npos);
    CHECK(result.out.empty());
  };
  for (const char* command : {"run", "check", "bench"}) {
    refused({ANNULUS_PROGRAM, command}, {});
    refused({ANNULUS_PROGRAM, command}, {"--segment-lengths", "2048", "--dilation-rates", "1"});
    refused({ANNULUS_PROGRAM, command}, {"--segment-lengths", "2048,4096", "--dilation-rates", "1,4", "--virtual-ranks", "512"});
    refused({ANNULUS_LAUNCH, "2", ANNULUS_PROGRAM, command}, {"--causal"});
  }
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

TEST_CASE("lengths of keys come from the file or a flag, and one that contradicts the file is refused") {
  const TemporaryFolder folder;
  const std::string path = folder / "input.h5";
  const std::string plain = folder / "plain.h5";
  const std::vector<std::string> shape{"generate", "--batch", "2", "--seq-len", "60", "--heads", "2", "--head-dim", "8", "--output"};
  const auto generated = [&](std::vector<std::string> more) {
    more.insert(more.begin(), shape.begin(), shape.end());
    return annulus_with(more).exit_code;
  };
  REQUIRE(generated({path, "--kv-lengths", "33,5"}) == 0);
  REQUIRE(generated({plain}) == 0);
  const std::vector<std::string> pattern{"--segment-lengths", "20", "--threads", "1", "--virtual-ranks", "3"};
  const auto with_pattern = [&](std::vector<std::string> line) {
    line.insert(line.end(), pattern.begin(), pattern.end());
    return annulus_with(line);
  };
  // Of 60 rows of each entry and head, 20 and 40 are in segments whose keys are all hidden.
  const ProcessResult run = with_pattern({"run", "--input", path});
  INFO(run.out << run.err);
  CHECK(run.out.find("kv-lengths 5 to 33") != std::string::npos);
  CHECK(run.out.find("rows that see no key: 120 (batch, head, row)") != std::string::npos);
  CHECK(with_pattern({"check", "--input", path}).exit_code == 0);
  CHECK(with_pattern({"check", "--input", path, "--kv-lengths", "33,5"}).exit_code == 0);
  CHECK(with_pattern({"check", "--input", plain, "--kv-lengths", "60,1", "--causal"}).exit_code == 0);
  expect_refusal({"run", "--input", path, "--kv-lengths", "33,6"}, "--kv-lengths 33,6 contradicts /kv_lengths of the input file");
  expect_refusal({"run", "--input", plain, "--kv-lengths", "3"}, "kv-lengths has 1 numbers, and batch is 2");
  expect_refusal({"plan", "--input", path, "--ragged", "zero-keys"}, "cannot have kv-lengths");
}

TEST_CASE("extra keys come from the file or a number of them is generated, and every row sees them") {
  const TemporaryFolder folder;
  const std::string path = folder / "input.h5";
  const std::vector<std::string> shape{"--batch", "2", "--seq-len", "60", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"};
  const auto with = [&](std::vector<std::string> line, const std::vector<std::string>& more) {
    line.insert(line.end(), more.begin(), more.end());
    return annulus_with(line);
  };
  REQUIRE(with({"generate", "--output", path, "--extra-keys", "3"}, shape).exit_code == 0);
  // Half of the rows are in no branch.
  const std::vector<std::string> pattern{"--segment-lengths", "20", "--dilation-rates", "2", "--threads", "1", "--virtual-ranks", "3"};
  const ProcessResult run = with({"run", "--input", path}, pattern);
  INFO(run.out << run.err);
  CHECK(run.out.find("kv-heads 2, head-dim 8, fp32, extra-keys 3") != std::string::npos);
  CHECK(run.out.find("rows that see no key: 0 (batch, head, row)") != std::string::npos);
  CHECK(with({"check", "--input", path, "--causal"}, pattern).exit_code == 0);
  CHECK(with({"check", "--input", path, "--order", "hilbert", "--mixing", "mean"}, pattern).exit_code == 0);
  CHECK(with({"check", "--input", path, "--grid", "heads=3"}, pattern).exit_code == 0);
  CHECK(with({"check", "--input", path, "--extra-keys", "3", "--backend", "reference"}, pattern).exit_code == 0);
  expect_refusal({"run", "--input", path, "--extra-keys", "2"}, "--extra-keys 2 contradicts the input file " + path + ", which has 3");
  expect_refusal({"run", "--extra-keys", "2", "--layer.zero-tokens", "1"},
                 "--extra-keys 2: of a layer they are what it appends (--layer.bias-kv, --layer.zero-tokens), which is 1");
  const ProcessResult config = annulus_with({"run", "--extra-keys", "2", "--print-config"});
  CHECK(config.out.find("extra-keys = 2") != std::string::npos);
}

TEST_CASE("dropout is reported, checked around a layer too, and read back") {
  const std::vector<std::string> shape{"--seq-len", "60", "--heads", "2", "--head-dim", "8", "--threads", "1"};
  const auto with = [&](std::vector<std::string> line) {
    line.insert(line.end(), shape.begin(), shape.end());
    return annulus_with(line);
  };
  const ProcessResult run = with({"run", "--dropout", "0.25", "--dropout-seed", "7"});
  INFO(run.out << run.err);
  CHECK(run.out.find("fp32, dropout 0.25 (seed 7)") != std::string::npos);
  CHECK(with({"check", "--dropout", "0.25", "--gradients", "--virtual-ranks", "3"}).exit_code == 0);
  CHECK(with({"check", "--dropout", "0.5", "--layer.embed", "16", "--virtual-ranks", "2"}).exit_code == 0);
  const ProcessResult config = with({"run", "--dropout", "0.25", "--print-config"});
  CHECK(config.out.find("dropout = 0.25") != std::string::npos);
  CHECK(config.out.find("dropout-seed = 0") != std::string::npos);
}

TEST_CASE("bench prints one header and one line for each combination, the last sweep's values fastest") {
  const ProcessResult result = annulus_with({"bench", "--heads", "2", "--head-dim", "8", "--threads", "1", "--repetitions", "2", "--sweep",
                                             "seq-len=30..130*2,7", "--sweep", "schedule=ring,ring-full", "--virtual-ranks", "3"});
  INFO(result.err);
  REQUIRE(result.exit_code == 0);
  const std::vector<std::vector<std::string>> rows = rows_of(result.out);
  REQUIRE(rows.size() == 9);
  CHECK((rows[0][0] == "schedule" && rows[0][1] == "ranks" && rows[0][2] == "seq-len"));
  const std::vector<std::string> lengths{"30", "60", "120", "7"};
  for (std::size_t i = 0; i < 8; ++i) {
    CHECK(rows[i + 1][0] == (i % 2 == 0 ? "ring" : "ring-full"));
    CHECK(rows[i + 1][1] == "3");
    CHECK(rows[i + 1][2] == lengths[i / 2]);
  }
}

TEST_CASE("bench without a sweep prints a header, its row and the check of its output") {
  const ProcessResult result = annulus_with(with_small("bench", {"--repetitions", "2", "--causal"}));
  INFO(result.err);
  REQUIRE(result.exit_code == 0);
  CHECK(result.out.starts_with("# PASS configured problem"));
  const std::vector<std::vector<std::string>> rows = rows_of(result.out);
  REQUIRE(rows.size() == 2);
  CHECK(rows[1].size() >= 16);
  CHECK((rows[1][0] == "1" && rows[1][1] == "64" && rows[1][4] == "fp32" && rows[1][5] == "true"));
}

TEST_CASE("bench writes its rows as CSV and HDF5, complete, and refuses to replace them without --force") {
  const TemporaryFolder folder;
  const std::vector<std::string> arguments = with_small("bench", {"--repetitions", "2", "--sweep", "dtype=fp32,bf16", "--segment-lengths",
                                                                  "16,32", "--csv", folder / "rows.csv", "--output", folder / "rows.h5"});
  const ProcessResult result = annulus_with(arguments);
  INFO(result.err);
  REQUIRE(result.exit_code == 0);
  const std::vector<std::string> lines = lines_of(read_text(folder / "rows.csv"));
  REQUIRE(lines.size() == 3);
  CHECK(lines[0].starts_with("batch,seq-len,heads,kv-heads,head-dim,dtype,causal,scale,"));
  CHECK(lines[1].starts_with("1,64,2,2,8,fp32,false,0.3535533905932737"));
  CHECK(lines[2].starts_with("1,64,2,2,8,bf16,false,"));
  CHECK(lines[1].find(",\"16,32\",\"1,1\",") != std::string::npos);  // a list is quoted
  CHECK(std::filesystem::file_size(folder / "rows.h5") > 1000);
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), std::filesystem::directory_iterator{}) == 2);

  expect_refusal(arguments, "--force");
  std::filesystem::remove(folder / "rows.csv");
  expect_refusal(arguments, "rows.h5' exists");
  CHECK_FALSE(std::filesystem::exists(folder / "rows.csv"));
  std::vector<std::string> forced = arguments;
  forced.emplace_back("--force");
  CHECK(annulus_with(forced).exit_code == 0);
  expect_refusal(with_small("bench", {"--csv", folder / "same", "--output", folder.path() + "/./same"}), "the same file");
}

TEST_CASE("bench on several processes sweeps them together and one of them tells a mistake") {
  const auto launch = [](const std::vector<std::string>& more) {
    std::vector<std::string> all{ANNULUS_LAUNCH, "3", ANNULUS_PROGRAM};
    for (const std::string& argument : with_small("bench", {"--repetitions", "2"})) { all.push_back(argument); }
    all.insert(all.end(), more.begin(), more.end());
    return run_process(all, 60);
  };
  const ProcessResult good = launch({"--sweep", "causal=false,true", "--sweep", "seq-len=5,50"});
  INFO(good.err);
  CHECK(good.exit_code == 0);
  const std::vector<std::vector<std::string>> rows = rows_of(good.out);
  REQUIRE(rows.size() == 5);
  for (std::size_t i = 1; i < 5; ++i) { CHECK(rows[i][0] == "3"); }

  const ProcessResult bad = launch({"--sweep", "transport=mpi,self"});
  INFO(bad.err);
  CHECK(bad.exit_code == 2);
  CHECK(bad.out.empty());
  const std::string message = "row 2 of 2 (transport self): transport self is for one rank";
  const std::size_t first = bad.err.find(message);
  CHECK(first != std::string::npos);
  CHECK(bad.err.find(message, first + 1) == std::string::npos);
}

TEST_CASE("info lists every kernel with its dtypes and head dims, says why there is no GPU, and where each rank runs") {
  const ProcessResult serial = annulus_with({"info"});
  REQUIRE(serial.exit_code == 0);
  CHECK(serial.out.find("\nreference  loops") != std::string::npos);
  CHECK(serial.out.find("\ncpu        tiles") != std::string::npos);
  CHECK(serial.out.find("fp32, fp16, bf16  1 to 256") != std::string::npos);
  CHECK(serial.out.find("CUDA-aware") != std::string::npos);
  CHECK(serial.out.find("\nrank 0 ") != std::string::npos);
#if ANNULUS_TEST_HAS_CUDA
  CHECK(serial.out.find("\ncuda       cublas  fp32, fp16, bf16  1 to 256      64, 128, 256 ") != std::string::npos);
  CHECK(serial.out.find("\ncuda       fused   fp16, bf16        8, 16 to 256  16, 24, 32, 48, 64, 96, 128, 256  tensor cores") !=
        std::string::npos);
  const ProcessResult hidden = annulus_with({"info"}, {"CUDA_VISIBLE_DEVICES="});
  CHECK(hidden.exit_code == 0);
  CHECK(hidden.out.find("\nno GPU: this ") != std::string::npos);
#else
  CHECK(serial.out.find("\nno GPU: this binary is built without CUDA") != std::string::npos);
#endif
  const ProcessResult launched = run_process({ANNULUS_LAUNCH, "3", ANNULUS_PROGRAM, "info", "--json"}, 60);
  CHECK(launched.exit_code == 0);
  for (const char* key : {"\"kernels\"", "\"gpus\"", "\"links\"", "\"mpi_cuda_aware\"", "\"rank\": 2"}) {
    INFO(key);
    CHECK(launched.out.find(key) != std::string::npos);
  }
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
  const ProcessResult row = annulus_with(with_small("bench", {"--repetitions", "1", "--json"}));
  CHECK((row.out.starts_with("{\n") && row.out.ends_with("}\n")));
  CHECK(row.out.find("\"median_ms\"") != std::string::npos);
  const ProcessResult sweep =
      annulus_with(with_small("bench", {"--repetitions", "1", "--json", "--virtual-ranks", "2", "--sweep", "causal=true"}));
  CHECK((sweep.out.starts_with("[\n") && sweep.out.ends_with("]\n")));
  CHECK(sweep.out.find("\"skew_ms\"") != std::string::npos);
  CHECK(sweep.out.find("\"causal\": true") != std::string::npos);
}
