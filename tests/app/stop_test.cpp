// SPDX-License-Identifier: Apache-2.0
// Jobs that are asked to stop: they keep what they have and say that work is left.
#include <annulus_test.hpp>

#include "bench_table.hpp"
#include "io/hdf5_fixture.hpp"
#include "program.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <signal.h>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

constexpr int kStopped = 4;

std::ptrdiff_t lines_in(const std::string& path) {
  const std::string text = read_text(path);
  return std::count(text.begin(), text.end(), '\n');
}

/// Five rows that take no time, and one whose repetitions take tenths of a second each and a minute together.
std::vector<std::string> six_rows(int ranks, const TemporaryFolder& folder, const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments{"bench",
                                     "--heads",
                                     "4",
                                     "--head-dim",
                                     "64",
                                     "--threads",
                                     "1",
                                     "--rows",
                                     "4",
                                     "--repetitions",
                                     "300",
                                     "--sweep",
                                     "seq-len=8,9,10,11,12,4000",
                                     "--csv",
                                     folder / "r.csv",
                                     "--output",
                                     folder / "r.h5"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  if (ranks > 1) { arguments.insert(arguments.begin(), {ANNULUS_LAUNCH, std::to_string(ranks)}); }
  arguments.insert(arguments.begin() + (ranks > 1 ? 2 : 0), ANNULUS_PROGRAM);
  return arguments;
}

/// Whether process `pid` has a handler for `signal`.
bool handles(pid_t pid, int signal) {
  const std::string status = read_text("/proc/" + std::to_string(pid) + "/status");
  const std::string key = "SigCgt:\t";
  const std::size_t place = status.find(key);
  if (place == std::string::npos) { return false; }
  const unsigned long long caught = std::stoull(status.substr(place + key.size(), 16), nullptr, 16);
  return (caught >> (signal - 1) & 1U) != 0;
}

/// Sends signals, one a tenth of a second, from half a second after the CSV file has its header and five rows.
std::function<void(pid_t)> sending(std::vector<int> signals, const TemporaryFolder& folder) {
  return [signals, &folder, seen = std::size_t{0}](pid_t pid) mutable {
    constexpr std::size_t kFirst = 50;
    constexpr std::size_t kApart = 10;
    if (lines_in(folder / "r.csv") < 6) { return; }
    ++seen;
    if (seen % kApart != 0 || seen < kFirst) { return; }
    const std::size_t number = seen / kApart - kFirst / kApart;
    if (number < signals.size()) { kill(pid, signals[number]); }
  };
}

void check_five_rows(const TemporaryFolder& folder) {
  CHECK(lines_in(folder / "r.csv") == 6);
  const RawDataset lengths(folder / "r.h5", "/rows/seq-len");
  CHECK(lengths.extents == std::vector<hsize_t>{5});
  CHECK(RawDataset(folder / "r.h5", "/samples_ms").extents == std::vector<hsize_t>{5, 300});
  CHECK(std::string(RawDataset(folder / "r.h5", "/provenance/rows").as<char>()) == "5 of 6");
  CHECK(sorted_names(folder) == std::vector<std::string>{"r.csv", "r.h5"});
}

/// A bench of six rows of some hundredths of a second each.
std::vector<std::string> short_rows(int ranks, const TemporaryFolder& folder, const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments{ANNULUS_PROGRAM, "bench",
                                     "--heads",       "2",
                                     "--head-dim",    "16",
                                     "--threads",     "1",
                                     "--rows",        "300",
                                     "--repetitions", "3",
                                     "--warmup",      "1",
                                     "--sweep",       "seq-len=300,400,500",
                                     "--sweep",       "causal=false,true",
                                     "--csv",         folder / "r.csv",
                                     "--output",      folder / "r.h5"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  if (ranks > 1) { arguments.insert(arguments.begin(), {ANNULUS_LAUNCH, std::to_string(ranks)}); }
  return arguments;
}

/// Ranks that wait leave the cores to others: these jobs are many, and their machine may be small and busy.
const std::vector<std::string> kYielding{"OMPI_MCA_mpi_yield_when_idle=1"};

/// Asks a job to stop, or ends it, in a way that is drawn. Of two ranks one may be met, or the launcher.
bool disturb(pid_t job, int ranks, std::mt19937& random) {
  if (ranks == 1) {
    const int signal = std::array{SIGUSR1, SIGTERM, SIGKILL}[random() % 3];
    kill(job, signal);
    if (signal == SIGTERM && random() % 2 == 0) { kill(job, signal); }
    return true;
  }
  const std::vector<pid_t> processes = descendants_named(job, "annulus");
  if (processes.size() != 2) { return false; }
  const pid_t rank = processes[random() % 2];
  switch (random() % 4) {
    case 0:
      return kill(job, SIGUSR1) == 0;
    case 1:
      return kill(job, SIGTERM) == 0;
    case 2:
      return kill(rank, SIGTERM) == 0;
    default:
      return kill(rank, SIGKILL) == 0;
  }
}

/// One job that is met at a drawn moment, and then as many as it takes to complete its table.
void check_resumed(int ranks, std::uint32_t seed, double whole_s, const CsvColumns& whole) {
  const TemporaryFolder folder;
  std::mt19937 random(seed);
  const double moment_s = std::uniform_real_distribution<double>(0.02, whole_s)(random);
  const auto begin = std::chrono::steady_clock::now();
  bool met = false;
  INFO(ranks << " ranks, seed " << seed << ", at " << moment_s << " s");

  const ProcessResult first = run_process(short_rows(ranks, folder, {"--resume"}), 60, kYielding, [&](pid_t job) {
    const double elapsed_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (!met && elapsed_s >= moment_s) { met = disturb(job, ranks, random); }
  });
  const std::string rows_before = read_text(folder / "r.csv");
  const ProcessResult second = run_process(short_rows(ranks, folder, {"--resume"}), 60, kYielding);

  INFO("first: " << first.exit_code << "\n" << first.out << first.err << "second:\n" << second.out << second.err);
  CHECK_FALSE(first.timed_out);
  CHECK(second.exit_code == 0);
  CHECK(read_text(folder / "r.csv").starts_with(rows_before));
  CHECK(lasting_columns_in(folder / "r.csv") == whole);
  CHECK(RawDataset(folder / "r.h5", "/samples_ms").extents == std::vector<hsize_t>{6, 3});
  CHECK(RawDataset(folder / "r.h5", "/timings/5/compute_ms").extents.size() == 2);
  CHECK(std::string(RawDataset(folder / "r.h5", "/provenance/rows").as<char>()) == "6 of 6");
}

}  // namespace

TEST_CASE("a bench that a signal asks to stop ends between repetitions with the rows that it has, on one rank and on two") {
  for (const int ranks : {1, 2}) {
    for (const int signal : {SIGUSR1, SIGTERM}) {
      // mpirun passes SIGUSR1 on; SIGTERM makes it end the ranks by itself, a second later by force.
      if (ranks > 1 && signal == SIGTERM) { continue; }
      const TemporaryFolder folder;

      const ProcessResult result = run_process(six_rows(ranks, folder), 60, {}, sending({signal}, folder));

      INFO(ranks << " ranks, signal " << signal << "\n" << result.out << result.err);
      CHECK(result.exit_code == kStopped);
      CHECK_THAT(result.err,
                 contains_text(std::string("annulus: stopped by ") + (signal == SIGUSR1 ? "SIGUSR1" : "SIGTERM") + " after 5 of 6 rows"));
      check_five_rows(folder);
    }
  }
}

TEST_CASE("one rank of two that gets SIGTERM stops both") {
  const TemporaryFolder folder;
  bool sent = false;

  const ProcessResult result = run_process(six_rows(2, folder), 60, {}, [&](pid_t launcher) {
    if (sent || lines_in(folder / "r.csv") < 6) { return; }
    const std::vector<pid_t> ranks = descendants_named(launcher, "annulus");
    if (ranks.size() == 2) { sent = kill(ranks.back(), SIGTERM) == 0; }
  });

  INFO(result.out << result.err);
  CHECK(result.exit_code == kStopped);
  CHECK_THAT(result.err, contains_text("annulus: stopped by SIGTERM after 5 of 6 rows"));
  check_five_rows(folder);
}

TEST_CASE("a second SIGTERM ends a bench at once, with complete files") {
  const TemporaryFolder folder;
  std::vector<std::string> arguments = six_rows(1, folder);
  std::replace(arguments.begin(), arguments.end(), std::string("seq-len=8,9,10,11,12,4000"), std::string("seq-len=8,9,10,11,12,60000"));

  const ProcessResult result = run_process(arguments, 60, {}, sending({SIGTERM, SIGTERM}, folder));

  INFO(result.out << result.err);
  CHECK(result.exit_code == 128 + SIGTERM);
  CHECK(result.seconds < 30);
  check_five_rows(folder);
}

TEST_CASE("SIGUSR1 does not count as the first SIGTERM") {
  const TemporaryFolder folder;

  const ProcessResult result = run_process(six_rows(1, folder), 60, {}, sending({SIGUSR1, SIGUSR1, SIGTERM}, folder));

  INFO(result.out << result.err);
  CHECK(result.exit_code == kStopped);
  check_five_rows(folder);
}

TEST_CASE("the rows of a bench that was stopped are one JSON document") {
  const TemporaryFolder folder;

  const ProcessResult result = run_process(six_rows(1, folder, {"--json"}), 60, {}, sending({SIGUSR1}, folder));

  INFO(result.err);
  CHECK(result.exit_code == kStopped);
  const nlohmann::json rows = nlohmann::json::parse(result.out, nullptr, false);
  REQUIRE(rows.is_array());
  CHECK(rows.size() == 5);
}

TEST_CASE("a bench that is asked to stop before its first row leaves no file") {
  const TemporaryFolder folder;

  const ProcessResult result = run_process(six_rows(1, folder, {"--max-time", "1e-9"}), 60);
  const ProcessResult json = run_process(six_rows(1, folder, {"--max-time", "1e-9", "--json"}), 60);

  INFO(result.out << result.err << json.err);
  CHECK(result.exit_code == kStopped);
  CHECK_THAT(result.err, contains_text("annulus: stopped by its time limit after 0 of 6 rows"));
  CHECK(json.exit_code == kStopped);
  CHECK(nlohmann::json::parse(json.out, nullptr, false) == nlohmann::json::array());
  CHECK(folder.names().empty());
}

TEST_CASE("a bench stops when its time is up") {
  for (const int ranks : {1, 2}) {
    const TemporaryFolder folder;
    constexpr double kLimit_s = 3;

    const ProcessResult result = run_process(six_rows(ranks, folder, {"--max-time", "3"}), 60);

    INFO(result.out << result.err);
    CHECK(result.exit_code == kStopped);
    CHECK(result.seconds >= kLimit_s);
    const std::ptrdiff_t rows = std::max<std::ptrdiff_t>(1, lines_in(folder / "r.csv")) - 1;
    CHECK(rows < 6);
    CHECK_THAT(result.err, contains_text("annulus: stopped by its time limit after " + std::to_string(rows) + " of 6 rows"));
  }
}

TEST_CASE("check stops between cases, by a signal and when its time is up") {
  const std::vector<std::string> cases{"check", "--cases", "1000000", "--seed", "3"};
  std::vector<std::string> limited = cases;
  limited.insert(limited.end(), {"--max-time", "1.5", "--json"});
  bool sent = false;

  const ProcessResult by_signal = annulus_with(cases, {}, 60, [&](pid_t pid) {
    if (!sent && handles(pid, SIGUSR1)) { sent = kill(pid, SIGUSR1) == 0; }
  });
  const ProcessResult by_time = annulus_with(limited);

  INFO(by_signal.out << by_signal.err << by_time.err);
  CHECK(by_signal.exit_code == kStopped);
  CHECK_THAT(by_signal.err, contains_text("annulus: stopped by SIGUSR1 after "));
  CHECK_THAT(by_signal.err, contains_text(" of 1000000 cases"));
  CHECK(by_time.exit_code == kStopped);
  const nlohmann::json verdict = nlohmann::json::parse(by_time.out, nullptr, false);
  REQUIRE(verdict.is_object());
  CHECK(verdict["passed"] == true);
  CHECK_FALSE(verdict["cases"].empty());
  CHECK(verdict["stopped"].get<std::string>().starts_with("stopped by its time limit after "));
}

TEST_CASE("a bench that is met at any moment is gone on with to the rows of one that was not, on one rank and on two") {
  constexpr std::uint32_t kMoments = 20;
  for (const int ranks : {1, 2}) {
    const TemporaryFolder folder;
    const ProcessResult result = run_process(short_rows(ranks, folder), 60, kYielding);
    INFO(result.err);
    REQUIRE(result.exit_code == 0);
    const auto whole = lasting_columns_in(folder / "r.csv");
    REQUIRE(whole.at("seq-len") == std::vector<std::string>{"300", "300", "400", "400", "500", "500"});

    for (std::uint32_t seed = 1; seed <= kMoments; ++seed) { check_resumed(ranks, seed, result.seconds, whole); }
  }
}

TEST_CASE("a table that is complete is gone on with by doing nothing") {
  const TemporaryFolder folder;
  REQUIRE(run_process(short_rows(1, folder), 60).exit_code == 0);
  const std::string rows = read_text(folder / "r.csv");

  const ProcessResult table = run_process(short_rows(1, folder, {"--resume"}), 60);
  const ProcessResult json = run_process(short_rows(1, folder, {"--resume", "--json"}), 60);

  INFO(table.err << json.err);
  CHECK(table.exit_code == 0);
  CHECK_THAT(table.out, Catch::Matchers::StartsWith("# 6 of 6 rows are in "));
  CHECK(json.exit_code == 0);
  CHECK(nlohmann::json::parse(json.out, nullptr, false) == nlohmann::json::array());
  CHECK(read_text(folder / "r.csv") == rows);
}

TEST_CASE("rows of another table, and files of another kind, are not gone on with") {
  const TemporaryFolder folder;
  REQUIRE(run_process(short_rows(1, folder), 60).exit_code == 0);
  const std::string rows = read_text(folder / "r.csv");
  const auto refusal = [&](int ranks, const std::vector<std::string>& more) {
    const ProcessResult result = run_process(short_rows(ranks, folder, more), 60);
    CHECK(result.exit_code == 2);
    return result.err;
  };

  CHECK_THAT(refusal(1, {"--resume", "--force"}), contains_text("--resume goes on with --output, and --force begins it anew"));
  CHECK_THAT(refusal(1, {"--resume", "--seed", "7"}), contains_text("have seed '1' and this job '7'"));
  CHECK_THAT(refusal(1, {"--resume", "--sweep", "seq-len=8"}), contains_text("is swept twice"));
  CHECK_THAT(refusal(2, {"--resume"}), contains_text("were measured on 1 ranks, and this job has 2"));
  CHECK_THAT(refusal(1, {}), contains_text("exists; --force replaces it"));
  CHECK_THAT(annulus_with(with_small("bench", {"--resume"})).err, contains_text("--output, which is not given"));
  CHECK(read_text(folder / "r.csv") == rows);

  std::ofstream(folder / "other.csv") << "precious";
  std::vector<std::string> other_csv = short_rows(1, folder, {"--resume"});
  std::replace(other_csv.begin(), other_csv.end(), folder / "r.csv", folder / "other.csv");
  CHECK(run_process(other_csv, 60).exit_code == 2);
  CHECK(read_text(folder / "other.csv") == "precious");

  std::ofstream(folder / "r.h5") << "no HDF5";
  CHECK_THAT(refusal(1, {"--resume"}), contains_text("r.h5'"));
  CHECK(read_text(folder / "r.h5") == "no HDF5");
}

TEST_CASE("a CSV file that lacks the last row of the HDF5 file gets it when the job is gone on with") {
  const TemporaryFolder folder;
  REQUIRE(run_process(short_rows(1, folder), 60).exit_code == 0);
  const std::string rows = read_text(folder / "r.csv");
  const std::size_t last = rows.rfind('\n', rows.size() - 2);
  std::ofstream(folder / "r.csv") << rows.substr(0, last + 1);

  const ProcessResult result = run_process(short_rows(1, folder, {"--resume"}), 60);

  INFO(result.err);
  CHECK(result.exit_code == 0);
  CHECK(read_text(folder / "r.csv") == rows);
}
