// SPDX-License-Identifier: Apache-2.0
// Ranks of one job that were told different things.
#include <annulus_test.hpp>

#include "process.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

using Arguments = std::vector<std::string>;

/// Starts one rank for each entry; "NAME=value" entries before the command are its environment.
ProcessResult launch(const std::vector<Arguments>& ranks, double limit_s = 60) {
  Arguments line{ANNULUS_LAUNCH};
  for (const Arguments& rank : ranks) {
    const Arguments before = line.size() == 1 ? Arguments{"1"} : Arguments{":", "-n", "1"};
    line.insert(line.end(), before.begin(), before.end());
    if (rank.front().find('=') != std::string::npos) { line.emplace_back("env"); }
    std::size_t index = 0;
    for (; rank[index].find('=') != std::string::npos; ++index) { line.push_back(rank[index]); }
    line.emplace_back(ANNULUS_PROGRAM);
    line.insert(line.end(), rank.begin() + static_cast<std::ptrdiff_t>(index), rank.end());
  }
  return run_process(line, limit_s);
}

Arguments command(const std::string& name, const Arguments& more = {}) {
  Arguments all{name};
  if (name != "info") {
    if (name != "plan" && name != "generate") { all.insert(all.end(), {"--threads", "1"}); }
    for (const auto& [flag, value] : {std::pair{"--seq-len", "100"}, {"--heads", "2"}, {"--head-dim", "16"}}) {
      if (std::find(more.begin(), more.end(), flag) != more.end()) { continue; }
      all.insert(all.end(), {flag, value});
    }
  }
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

/// The job ends with exit code 2 and one sentence of the program, which has all of `parts`.
void expect_refusal(const std::vector<Arguments>& ranks, const std::vector<std::string>& parts, double limit_s = 60) {
  const ProcessResult result = launch(ranks, limit_s);
  INFO(result.err);
  CHECK(result.exit_code == 2);
  CHECK_FALSE(result.timed_out);
  CHECK(result.out.empty());
  const std::size_t first = result.err.find("annulus: ");
  REQUIRE(first != std::string::npos);
  CHECK(result.err.find("annulus: ", first + 1) == std::string::npos);
  const std::string sentence = result.err.substr(first, result.err.find('\n', first) - first);
  for (const std::string& part : parts) {
    INFO(part);
    CHECK(sentence.find(part) != std::string::npos);
  }
}

bool is_empty(const TemporaryFolder& folder) { return std::filesystem::is_empty(folder.path()); }

void generate(const std::string& path, const Arguments& more) {
  Arguments line = command("generate", more);
  line.insert(line.begin(), ANNULUS_PROGRAM);
  line.insert(line.end(), {"--output", path});
  REQUIRE(run_process(line, 60).exit_code == 0);
}

}  // namespace

TEST_CASE("an option that shapes the plan or the numbers and differs is named with both ranks and both values") {
  const std::vector<Arguments> differences{
      {"seq-len", "100", "200"},       {"heads", "2", "4"},
      {"head-dim", "16", "32"},        {"batch", "1", "2"},
      {"scale", "0.25", "0.5"},        {"seed", "1", "2"},
      {"mixing", "lse", "mean"},       {"offset", "group", "head"},
      {"dtype", "fp16", "bf16"},       {"causal", "false", "true"},
      {"kv-lengths", "50", "51"},      {"head-split", "first", "all"},
      {"segment-lengths", "32", "64"}, {"schedule", "ring", "ring-full"},
      {"backend", "reference", "cpu"}, {"scale-by-branches", "false", "true"},
      {"tile-rows", "8", "16"},        {"extra-keys", "1", "2"},
      {"dropout", "0.25", "0.5"},      {"dropout-seed", "1", "2"},
  };
  for (const Arguments& entry : differences) {
    expect_refusal({command("run", {"--" + entry[0], entry[1]}), command("run", {"--" + entry[0], entry[2]})},
                   {"rank 0 (", ") has " + entry[0] + " " + entry[1] + " and rank 1 (", ") has " + entry[0] + " " + entry[2]});
  }
}

TEST_CASE("a difference of one rank among three is found, and no result is begun") {
  const TemporaryFolder folder;
  const std::string path = folder / "m.h5";
  const Arguments usual = command("run", {"--output", path, "--timeout", "4"});
  expect_refusal({usual, usual, command("run", {"--output", path, "--timeout", "4", "--seq-len", "200"})},
                 {"rank 0 (", "seq-len 100", "rank 2 (", "seq-len 200"});
  expect_refusal({usual, command("run", {"--timeout", "4"}), usual}, {"output " + path, "rank 1 (", "output not given"});
  expect_refusal({usual, command("run", {"--output", folder / "n.h5"}), usual}, {"output " + path, "output " + (folder / "n.h5")});
  CHECK(is_empty(folder));
}

TEST_CASE("commands, sweeps and counts that differ are named") {
  expect_refusal({command("run"), command("check")}, {"the command run", "the command check"});
  expect_refusal({command("info"), command("bench")}, {"the command info", "the command bench"});
  expect_refusal({command("bench", {"--sweep", "heads=1,2"}), command("bench", {"--sweep", "heads=1,4"})},
                 {"sweep heads=1,2", "sweep heads=1,4"});
  expect_refusal({command("bench", {"--repetitions", "3"}), command("bench", {"--repetitions", "2"})}, {"repetitions 3", "repetitions 2"});
  expect_refusal({command("check", {"--cases", "3"}), command("check", {"--cases", "4"})}, {"cases 3", "cases 4"});
  expect_refusal({command("check", {"--cases", "3"}), command("check")}, {"cases 3", "cases not given"});
}

TEST_CASE("a mistake of one rank ends the job of all") {
  expect_refusal({command("run"), command("run", {"--heads", "0"})}, {"rank 1 (", "--heads 0 is below 1"});
  expect_refusal({command("run"), command("run"), {"dance"}}, {"rank 2 (", "dance"});
}

TEST_CASE("a rank that was told something that needs no MPI ends the job of those that wait for it") {
  for (const Arguments& other : {Arguments{"--help"}, Arguments{"--version"}, Arguments{"plan"}, Arguments{"run", "--print-config"}}) {
    const ProcessResult result = launch({command("run"), other});
    INFO(other.front() << "\n" << result.err);
    CHECK(result.exit_code != 0);
    CHECK(result.seconds < 30);
    // Where the other rank entered MPI before this one left, Open MPI finds it by itself.
    const bool told =
        result.exit_code == 2 && result.err.find("ended without entering MPI; all ranks must run the same command") != std::string::npos;
    CHECK((told || result.err.find("this process did not call \"init\" before exiting, but others in") != std::string::npos));
  }
}

TEST_CASE("what changes no result may differ: threads, patience, the way to the same values") {
  CHECK(launch({command("check"), {"check", "--threads", "2", "--seq-len", "100", "--heads", "2", "--head-dim", "16"}}).exit_code == 0);
  CHECK(launch({command("check"), {"check", "--seq-len", "100", "--heads", "2", "--head-dim", "16"}}).exit_code == 0);
  CHECK(launch({command("check", {"--timeout", "60"}), command("check", {"--scale", "0.25", "--segment-lengths", "100"})}).exit_code == 0);
}

TEST_CASE("other code for the same kernels is named") {
  expect_refusal({command("run"),
                  [] {
                    Arguments other{"LIBXSMM_TARGET=wsm", "OPENBLAS_CORETYPE=Nehalem"};
                    for (const std::string& argument : command("run")) { other.push_back(argument); }
                    return other;
                  }()},
                 {"instruction set and product library"});
}

TEST_CASE("input files are compared by what they hold, whatever their names, sizes and dates say") {
  const TemporaryFolder folder;
  // 1.2 M values of each tensor: more than are compared one by one.
  for (const char* length : {"100", "6000"}) {
    const std::string one = folder / (std::string(length) + "one.h5");
    const std::string copy = folder / (std::string(length) + "copy.h5");
    const std::string other = folder / (std::string(length) + "other.h5");
    generate(one, {"--seq-len", length, "--heads", "4", "--head-dim", "50"});
    generate(other, {"--seq-len", length, "--heads", "4", "--head-dim", "50", "--seed", "2"});
    std::filesystem::copy_file(one, copy);
    const auto reads = [](const std::string& path) { return Arguments{"run", "--threads", "1", "--input", path}; };
    CHECK(launch({reads(one), reads(copy)}).exit_code == 0);
    CHECK(launch({reads(one), reads(copy), reads(one)}).exit_code == 0);
    expect_refusal({reads(one), reads(copy), reads(other)}, {"rank 0 (", "values of /q", one, "rank 2 (", other});
    std::filesystem::copy_file(other, copy, std::filesystem::copy_options::overwrite_existing);
    std::filesystem::last_write_time(copy, std::filesystem::last_write_time(one));
    expect_refusal({reads(one), reads(copy)}, {"values of /q", one, copy});
  }
  // One bit of one value, in the middle of a small file.
  const std::string edited = folder / "edited.h5";
  std::filesystem::copy_file(folder / "100one.h5", edited);
  std::fstream file(edited, std::ios::in | std::ios::out | std::ios::binary);
  const auto middle = static_cast<std::streamoff>(std::filesystem::file_size(edited) / 8 * 4);
  file.seekg(middle);
  const int byte = file.get();
  file.seekp(middle);
  file.put(static_cast<char>(byte ^ 1));
  file.close();
  expect_refusal({{"run", "--input", folder / "100one.h5"}, {"run", "--input", edited}}, {"values of /", edited});

  const std::string longer = folder / "longer.h5";
  generate(longer, {"--seq-len", "101", "--heads", "4", "--head-dim", "50"});
  expect_refusal({{"run", "--input", folder / "100one.h5"}, {"run", "--input", longer}}, {"seq-len 100", "seq-len 101"});
  expect_refusal({{"run", "--input", longer}, command("run", {"--seq-len", "101", "--heads", "4", "--head-dim", "50"})},
                 {"input an input file", "input generator, seed 1"});
}

TEST_CASE("a program of another version is named by the first 64 bytes that it sends, before anything else is exchanged") {
  Arguments line{ANNULUS_LAUNCH, "1", ANNULUS_PROGRAM};
  for (const std::string& argument : command("check")) { line.push_back(argument); }
  const Arguments other{":", "-n", "2", ANNULUS_OTHER_VERSION_PROGRAM};
  line.insert(line.end(), other.begin(), other.end());
  const ProcessResult result = run_process(line, 60);
  INFO(result.err);
  CHECK(result.exit_code == 2);
  CHECK(result.out.empty());
  CHECK(result.err.find("annulus: rank 0 runs annulus ") != std::string::npos);
  CHECK(result.err.find("rank 1 runs annulus 9.8.7 (v9.8.7-6-gabcdef0); all ranks must run the same program") != std::string::npos);
}

TEST_CASE("a program that does not greet at all is waited for no longer than the timeout, at least 20 seconds") {
  Arguments line{ANNULUS_LAUNCH, "1", ANNULUS_PROGRAM};
  for (const std::string& argument : command("check", {"--timeout", "1"})) { line.push_back(argument); }
  const Arguments other{":", "-n", "1", ANNULUS_OTHER_VERSION_PROGRAM, "silent"};
  line.insert(line.end(), other.begin(), other.end());
  const ProcessResult result = run_process(line, 90);
  INFO(result.err);
  CHECK(result.exit_code == 3);
  CHECK(result.seconds < 60);
  CHECK(result.err.find("a rank runs another program, or an annulus of another version") != std::string::npos);
}
