// SPDX-License-Identifier: Apache-2.0
// Rows of a bench that is ended early.
#include <annulus_test.hpp>

#include "io/hdf5_fixture.hpp"
#include "program.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <signal.h>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

/// Five rows that take no time and one that takes minutes.
std::vector<std::string> six_rows(const TemporaryFolder& folder, const std::vector<std::string>& more) {
  std::vector<std::string> arguments{"bench",
                                     "--heads",
                                     "8",
                                     "--head-dim",
                                     "64",
                                     "--threads",
                                     "1",
                                     "--repetitions",
                                     "50",
                                     "--sweep",
                                     "seq-len=8,9,10,11,12,30000",
                                     "--csv",
                                     folder / "r.csv",
                                     "--output",
                                     folder / "r.h5"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

std::ptrdiff_t lines_in(const std::string& path) {
  const std::string text = read_text(path);
  return std::count(text.begin(), text.end(), '\n');
}

/// Ends the process by `signal` half a second after the CSV file has its header and five rows. The first SIGTERM only asks it to stop.
std::function<void(pid_t)> ending_by(int signal, const TemporaryFolder& folder) {
  return [signal, &folder, seen = 0](pid_t pid) mutable {
    constexpr int kPolls = 50;
    if (lines_in(folder / "r.csv") < 6) { return; }
    ++seen;
    if (seen == kPolls || (signal == SIGTERM && seen == kPolls + 10)) { kill(pid, signal); }
  };
}

void check_five_rows(const TemporaryFolder& folder) {
  CHECK(lines_in(folder / "r.csv") == 6);
  const RawDataset lengths(folder / "r.h5", "/rows/seq-len");
  CHECK(lengths.extents == std::vector<hsize_t>{5});
  CHECK(lengths.as<std::int64_t>()[4] == 12);
  CHECK(RawDataset(folder / "r.h5", "/samples_ms").extents == std::vector<hsize_t>{5, 50});
  CHECK(std::string(RawDataset(folder / "r.h5", "/provenance/rows").as<char>()) == "5 of 6");
}

}  // namespace

TEST_CASE("rows of a bench that is ended after five of six are in its files and on its standard output") {
  for (const int signal : {SIGTERM, SIGINT}) {
    const TemporaryFolder folder;
    const ProcessResult result = annulus_with(six_rows(folder, {"--json"}), {}, 60, ending_by(signal, folder));
    INFO(result.err);
    CHECK(result.exit_code == 128 + signal);
    check_five_rows(folder);
    CHECK(sorted_names(folder) == std::vector<std::string>{"r.csv", "r.h5"});
    const nlohmann::json rows = nlohmann::json::parse(result.out, nullptr, false);
    REQUIRE(rows.is_array());
    CHECK(rows.size() == 5);
  }
}

TEST_CASE("rows survive a kill that nothing can catch") {
  const TemporaryFolder folder;
  const ProcessResult result = annulus_with(six_rows(folder, {}), {}, 60, ending_by(SIGKILL, folder));
  CHECK(result.exit_code == 128 + SIGKILL);
  check_five_rows(folder);
}

TEST_CASE("so they do where several processes measured them, and the launcher is told to end") {
  const TemporaryFolder folder;
  std::vector<std::string> arguments{ANNULUS_LAUNCH, "2", ANNULUS_PROGRAM};
  const std::vector<std::string> bench = six_rows(folder, {});
  arguments.insert(arguments.end(), bench.begin(), bench.end());
  const ProcessResult result = run_process(arguments, 60, {}, ending_by(SIGTERM, folder));
  INFO(result.err);
  CHECK(result.exit_code != 0);
  check_five_rows(folder);
}

TEST_CASE("a bench that another program's file gets in the way of keeps that file, and its own rows beside it") {
  const TemporaryFolder folder;
  bool done = false;
  const ProcessResult result = annulus_with(
      with_small("bench", {"--repetitions", "300", "--sweep", "seq-len=64,65,66,2000", "--csv", folder / "r.csv"}), {}, 60, [&](pid_t) {
        if (done || lines_in(folder / "r.csv") < 2) { return; }
        done = true;
        std::ofstream(folder / "other") << "precious";
        std::filesystem::rename(folder / "other", folder / "r.csv");
      });
  INFO(result.err);
  CHECK(result.exit_code == 3);
  CHECK(read_text(folder / "r.csv") == "precious");
  CHECK(folder.names().size() == 2);
  CHECK(result.err.find("is kept as '") != std::string::npos);
}

TEST_CASE("a bench whose second output cannot be is refused before the first row") {
  const TemporaryFolder folder;
  const std::vector<std::string> slow{"bench", "--seq-len", "60000", "--heads", "8", "--threads", "1"};
  const auto refused = [&](const std::string& csv, const std::string& output, const std::string& limit) {
    std::string line = limit + " exec \"$A\"";
    for (const std::string& argument : slow) { line += " " + argument; }
    const ProcessResult result = run_bash(line + " --csv '" + csv + "' --output '" + output + "'", {}, 30);
    INFO(result.err);
    CHECK_FALSE(result.timed_out);
    CHECK(result.exit_code == 2);
    CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  };
  refused(folder / "r.csv", folder / "no/such/r.h5", "");
  refused(folder / "no/such/r.csv", folder / "r.h5", "");
  refused(folder / "r.csv", folder / "r.h5", "ulimit -f 1;");
  CHECK(folder.names().empty());
}
