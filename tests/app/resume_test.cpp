// SPDX-License-Identifier: Apache-2.0
// Runs whose batch is computed in parts, and what is left when they are ended. ANNULUS_KILLS asks for more ends of each kind than five.
#include <annulus_test.hpp>

#include "io/raw_dataset.hpp"
#include "program.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <random>
#include <signal.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

using namespace annulus::test;

namespace {

using Json = nlohmann::json;

constexpr int kStopped = 4;

std::vector<std::string> run_of(const std::vector<std::string>& problem, const std::string& output,
                                const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments{"run"};
  arguments.insert(arguments.end(), problem.begin(), problem.end());
  arguments.insert(arguments.end(), {"--output", output});
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

/// Seven sequences, with rows that nothing covers.
std::vector<std::string> seven(const std::vector<std::string>& more = {}) {
  std::vector<std::string> problem{"--batch", "7", "--seq-len", "67", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--seed", "3"};
  problem.insert(problem.end(), more.begin(), more.end());
  return problem;
}

/// Twelve sequences of some milliseconds each, or of more if they are longer.
std::vector<std::string> twelve(const std::string& seq_len = "1100") {
  return {"--batch", "12", "--seq-len", seq_len, "--heads", "4", "--head-dim", "64", "--threads", "1", "--causal"};
}

void require_same_rows(const std::string& left, const std::string& right, const std::vector<std::string>& datasets) {
  for (const std::string& name : datasets) {
    INFO(name);
    const RawDataset a(left, name);
    const RawDataset b(right, name);
    CHECK(a.extents == b.extents);
    CHECK(a.bytes == b.bytes);
  }
}

/// Whether a process holds a lock on the file.
bool is_locked(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor < 0) { return false; }
  struct flock whole{};
  whole.l_type = F_WRLCK;
  const bool known = ::fcntl(descriptor, F_OFD_GETLK, &whole) == 0;
  ::close(descriptor);
  return known && whole.l_type != F_UNLCK;
}

/// Halts a child; false if it has ended instead.
bool halt(pid_t child) {
  siginfo_t change{};
  ::kill(child, SIGSTOP);
  return ::waitid(P_PID, static_cast<id_t>(child), &change, WSTOPPED | WEXITED | WNOWAIT) == 0 && change.si_code == CLD_STOPPED;
}

std::vector<std::int64_t> integers_in(const std::string& path, const std::string& name) {
  const RawDataset dataset(path, name);
  const std::int64_t* begin = dataset.as<std::int64_t>();
  return {begin, begin + dataset.bytes.size() / sizeof(std::int64_t)};
}

}  // namespace

TEST_CASE("Parts give the rows of the whole batch", "[app][parts]") {
  struct Case {
    std::string name;
    std::vector<std::string> problem;
    std::vector<std::string> datasets{"/o", "/lse", "/rows/uncovered", "/rows/non_finite"};
  };
  const std::vector<Case> cases{
      {"dilated", seven({"--segment-lengths", "7,40", "--dilation-rates", "2,3", "--causal"})},
      {"bf16, lengths of keys", seven({"--dtype", "bf16", "--kv-lengths", "67,1,30,66,67,2,50"})},
      {"zero keys", seven({"--segment-lengths", "9,40", "--dilation-rates", "2,4", "--offset", "head-block", "--ragged", "zero-keys"})},
      {"hilbert", seven({"--segment-lengths", "20", "--order", "hilbert"})},
      {"extra keys", seven({"--extra-keys", "3", "--causal"})},
      {"dropout", seven({"--dropout", "0.3", "--segment-lengths", "40", "--dilation-rates", "3"})},
      {"gradients", seven({"--segment-lengths", "40", "--dilation-rates", "3", "--gradients"}), {"/o", "/lse", "/dq", "/dk", "/dv"}},
      {"a grid", seven({"--grid", "batch=2"})},
      {"a layer", seven({"--layer.embed", "24"}), {"/y", "/lse"}},
  };
  const auto& [name, problem, datasets] = GENERATE_REF(from_range(cases));
  const int ranks = GENERATE(1, 2, 3);
  const bool grid = name == "a grid";
  if (grid && ranks != 2) { return; }
  INFO(name << ", ranks " << ranks);
  const TemporaryFolder folder;
  const std::string whole = folder / "whole.h5";
  const std::string parts = folder / "parts.h5";
  REQUIRE(launch_annulus(ranks, run_of(problem, whole)).exit_code == 0);
  // Seven entries are parts of 2, 2, 2 and 1, and over a grid of 2 of 3, 2 and 2.
  const ProcessResult result = launch_annulus(ranks, run_of(problem, parts, {"--part-batch", grid ? "3" : "2"}));
  INFO(result.err);
  REQUIRE(result.exit_code == 0);
  require_same_rows(whole, parts, datasets);
  CHECK(integers_in(parts, "/parts/entries") == (grid ? std::vector<std::int64_t>{3, 2, 2} : std::vector<std::int64_t>{2, 2, 2, 1}));
  CHECK(integers_in(parts, "/parts/first_entry") == (grid ? std::vector<std::int64_t>{0, 3, 5} : std::vector<std::int64_t>{0, 2, 4, 6}));
  CHECK(sorted_names(folder) == std::vector<std::string>{"parts.h5", "whole.h5"});
  CHECK(RawDataset(parts, "/timings/compute_ms").extents[1] == static_cast<hsize_t>(ranks));
  if (name == "zero keys") {
    const RawDataset of_whole(whole, "/rows/zero_key_shares");
    const RawDataset of_parts(parts, "/rows/zero_key_shares");
    for (int branch = 0; branch < 2; ++branch) {
      CHECK(of_whole.as<double>()[branch] > 0);
      CHECK(of_parts.as<double>()[branch] == Approx(of_whole.as<double>()[branch]).epsilon(1e-12));
    }
  }
}

TEST_CASE("A stopped run goes on where it was", "[app][parts]") {
  const int ranks = GENERATE(1, 2);
  const TemporaryFolder folder;
  const std::string whole = folder / "whole.h5";
  const std::string parts = folder / "parts.h5";
  REQUIRE(launch_annulus(ranks, run_of(seven(), whole)).exit_code == 0);

  const ProcessResult stopped = launch_annulus(ranks, run_of(seven(), parts, {"--part-batch", "3", "--max-time", "1e-9"}));
  CHECK(stopped.exit_code == kStopped);
  CHECK_THAT(stopped.err, contains_text("stopped by its time limit after 0 of 3 parts; --resume goes on with"));
  CHECK(sorted_names(folder) == std::vector<std::string>{"parts.h5.unfinished", "whole.h5"});

  // Neither begun anew by accident, nor with what it was not begun with.
  CHECK_THAT(launch_annulus(ranks, run_of(seven(), parts, {"--part-batch", "3"})).err, contains_text("--resume goes on with it, --force"));
  const ProcessResult other = launch_annulus(ranks, run_of(seven({"--causal"}), parts, {"--resume"}));
  CHECK(other.exit_code == 2);
  CHECK_THAT(other.err, contains_text("'causal = false', not 'causal = true'"));
  const ProcessResult more_ranks = launch_annulus(ranks + 1, run_of(seven(), parts, {"--resume"}));
  CHECK(more_ranks.exit_code == 2);
  CHECK_THAT(more_ranks.err, contains_text("'ranks = " + std::to_string(ranks) + "', not"));

  // The parts are those of the file, whatever is asked for now.
  const ProcessResult rest = launch_annulus(ranks, run_of(seven(), parts, {"--resume", "--part-batch", "1"}));
  INFO(rest.err);
  CHECK(rest.exit_code == 0);
  require_same_rows(whole, parts, {"/o", "/lse"});
  CHECK(integers_in(parts, "/parts/complete") == std::vector<std::int64_t>{1, 1, 1});

  const ProcessResult again = launch_annulus(ranks, run_of(seven(), parts, {"--resume"}));
  CHECK(again.exit_code == 0);
  CHECK_THAT(again.err, contains_text("is complete already"));
  // Of a batch that is no more than one part nothing is left to go on with, and a requeued job needs no other command.
  const std::string one = folder / "one.h5";
  CHECK(launch_annulus(ranks, run_of(seven(), one, {"--resume"})).exit_code == 0);
  CHECK_THAT(launch_annulus(ranks, run_of(seven(), one, {"--resume"})).err, contains_text("is complete already"));
}

TEST_CASE("info tells how a result was made and how far it is", "[app][parts]") {
  const TemporaryFolder folder;
  const std::string output = folder / "o.h5";
  const auto told = [&](const std::string& path) { return Json::parse(annulus_with({"info", "--result", path, "--json"}).out); };
  REQUIRE(annulus_with(run_of(seven({"--dtype", "bf16"}), output, {"--part-batch", "3", "--max-time", "1e-9"})).exit_code == kStopped);

  const ProcessResult left = annulus_with({"info", "--result", output + ".unfinished"});
  CHECK(left.exit_code == 0);
  CHECK_THAT(left.out, contains_text("parts: 0 of 3 complete") && contains_text("left to do"));
  CHECK(told(output + ".unfinished")["parts"]["complete"] == Json{0, 0, 0});

  REQUIRE(annulus_with(run_of(seven({"--dtype", "bf16"}), output, {"--resume"})).exit_code == 0);
  const Json whole = told(output);
  CHECK(whole["datasets"] == Json{{{"name", "/lse"}, {"extents", {7, 4, 67}}, {"dtype", "fp32"}},
                                  {{"name", "/o"}, {"extents", {7, 67, 4, 8}}, {"dtype", "bf16"}}});
  CHECK(whole["parts"]["entries"] == Json{3, 2, 2});
  CHECK(whole["parts"]["complete"] == Json{1, 1, 1});
  // The second part has another number of entries than the first, and the third has the second's plan.
  CHECK(whole["parts"]["plans_made"][2] == 2);
  CHECK(whole["parts"]["memory_high_water"][0] > 0);
  CHECK_THAT(annulus_with({"info", "--result", output}).out,
             contains_text("/o            [7, 67, 4, 8] bf16") && contains_text("3 of 3 complete"));

  const std::string single = folder / "single.h5";
  REQUIRE(annulus_with(run_of(seven(), single)).exit_code == 0);
  const Json of_single = told(single);
  CHECK_THAT(of_single["provenance"]["memory"].get<std::string>(), contains_text("allocations of the system"));
  CHECK(of_single["provenance"]["plans"] == "1 made, 0 found");
  CHECK(of_single["parts"].empty());

  const auto refused = [&](const std::string& path, const std::string& why) {
    const ProcessResult result = annulus_with({"info", "--result", path});
    CHECK(result.exit_code == 2);
    CHECK_THAT(result.err, contains_text(why));
  };
  refused(folder / "none.h5", "No such file");
  std::ofstream(folder / "text.h5") << "no HDF5";
  refused(folder / "text.h5", "is not an HDF5 file");
  REQUIRE(annulus_with({"generate", "--seq-len", "8", "--output", folder / "input.h5"}).exit_code == 0);
  refused(folder / "input.h5", "has no /provenance");
}

TEST_CASE("What cannot be gone on with is refused", "[app][parts]") {
  const TemporaryFolder folder;
  const std::string output = folder / "o.h5";
  const auto refused = [&](const std::vector<std::string>& arguments, const std::string& why) {
    const ProcessResult result = annulus_with(arguments);
    CHECK(result.exit_code == 2);
    CHECK_THAT(result.err, contains_text(why));
  };
  refused({"run", "--seq-len", "8", "--resume"}, "--resume goes on with what is in --output, which is not given");
  refused(run_of(seven({"--grid", "batch=4", "--virtual-ranks", "4"}), output, {"--part-batch", "2"}), "fewer entries than the grid");
  std::ofstream(output + ".unfinished") << "no HDF5";
  refused(run_of(seven(), output, {"--resume"}), "is not an HDF5 file");
  CHECK(read_text(output + ".unfinished") == "no HDF5");
  std::filesystem::remove(output + ".unfinished");
  REQUIRE(annulus_with(run_of(seven(), output)).exit_code == 0);
  refused(run_of(seven(), output, {"--resume"}), "has no /provenance/settings");
}

TEST_CASE("One run at a time writes an unfinished file", "[app][parts]") {
  const TemporaryFolder folder;
  const std::string output = folder / "o.h5";
  const std::vector<std::string> long_problem = twelve("4000");  // a second or more, to be met in
  bool second = false;
  const ProcessResult first = annulus_with(run_of(long_problem, output, {"--part-batch", "1"}), {}, 60, [&](pid_t writer) {
    // Halted, for it must not end before the others have come.
    if (second || !std::filesystem::exists(output + ".unfinished") || !halt(writer)) { return; }
    second = is_locked(output + ".unfinished");
    for (const std::string flag : {"--resume", "--force"}) {
      if (!second) { break; }
      const ProcessResult result = annulus_with(run_of(long_problem, output, {"--part-batch", "1", flag}));
      CHECK(result.exit_code == 2);
      CHECK_THAT(result.err, contains_text("is being written by another run"));
    }
    ::kill(writer, SIGCONT);
  });
  CHECK(second);
  CHECK(first.exit_code == 0);
}

TEST_CASE("Whenever a run in parts is ended, it goes on to the same bits", "[app][parts]") {
  const int ranks = GENERATE(1, 2);
  const int signal = GENERATE(SIGKILL, SIGTERM);
  const TemporaryFolder folder;
  const std::string whole = folder / "whole.h5";
  REQUIRE(launch_annulus(ranks, run_of(twelve(), whole)).exit_code == 0);
  std::mt19937 random(static_cast<unsigned>(signal));
  const std::int64_t wanted = asked_for("ANNULUS_KILLS", 5);
  std::int64_t ended = 0;
  for (int file = 0; ended < wanted; ++file) {
    REQUIRE(file < 20 * wanted);
    const std::string output = folder / std::to_string(file).append(".h5");
    ProcessResult result;
    for (int attempt = 0; result.exit_code != 0; ++attempt) {
      REQUIRE(attempt < 100);
      int ticks = 1 + static_cast<int>(random() % 40);
      std::vector<std::string> arguments = run_of(twelve(), output, {"--part-batch", "1", "--resume"});
      arguments.insert(arguments.begin(), ANNULUS_PROGRAM);
      if (ranks > 1) { arguments.insert(arguments.begin(), {ANNULUS_LAUNCH, std::to_string(ranks)}); }
      result = run_process(arguments, 60, {}, [&](pid_t pid) {
        if (--ticks != 0) { return; }
        const std::vector<pid_t> all = ranks > 1 ? descendants_named(pid, "annulus") : std::vector<pid_t>{pid};
        if (!all.empty()) { ::kill(all[random() % all.size()], signal); }
      });
      INFO(result.err);
      // Of a rank that ends while the launcher still connects to it the launcher has no exit code, but says the signal.
      const bool by_signal = result.exit_code == 128 + signal || result.exit_code == kStopped ||
                             result.err.find("exited on signal " + std::to_string(signal)) != std::string::npos;
      CHECK((result.exit_code == 0 || by_signal));
      ended += by_signal ? 1 : 0;
    }
    require_same_rows(whole, output, {"/o", "/lse"});
    CHECK_FALSE(std::filesystem::exists(output + ".unfinished"));
  }
}
