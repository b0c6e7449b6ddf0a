// SPDX-License-Identifier: Apache-2.0
// The end of a long job, where the file system refuses the last system calls.
#include <annulus_test.hpp>

#include "program.hpp"

#include <cerrno>
#include <csignal>
#include <fstream>
#include <string>
#include <sys/stat.h>
#include <vector>

using namespace annulus::test;

namespace {

constexpr int kNoLocks = 524;  // ENOTSUPP of the kernel, which NFS lets through

/// The environment in which calls fail; of an address sanitizer too, which wants to be loaded first.
std::vector<std::string> failing(const std::vector<std::pair<std::string, int>>& errors) {
  std::vector<std::string> environment{"LD_PRELOAD=" ANNULUS_FAILING_CALLS};
  for (const auto& [name, error] : errors) { environment.push_back("FAIL_" + name + "=" + std::to_string(error)); }
  return environment;
}

using Names = std::vector<std::string>;

/// The size of the result of with_small("run"), written without trouble.
std::size_t usual_bytes() {
  const TemporaryFolder folder;
  REQUIRE(annulus_with(with_small("run", {"--output", folder / "o.h5"})).exit_code == 0);
  return read_text(folder / "o.h5").size();
}

}  // namespace

TEST_CASE("a result is written where a file system has no exclusive rename, links, locks, syncing or reserving") {
  const std::vector<std::vector<std::pair<std::string, int>>> lacks{
      {{"RENAMEAT2", EINVAL}, {"LINK", ENOSYS}},
      {{"RENAMEAT2", EINVAL}, {"LINK", EXDEV}},
      {{"RENAMEAT2", EINVAL}, {"LINK", EMLINK}},
      {{"RENAMEAT2", ENOSYS}, {"LINK", EPERM}},
      {{"RENAMEAT2", EOPNOTSUPP}, {"LINK", EOPNOTSUPP}},
      {{"RENAMEAT2", EPERM}},
      {{"FSYNC", ENOSYS}},
      {{"FSYNC", EOPNOTSUPP}},
      {{"FSYNC", EINVAL}},
      {{"FALLOCATE", EINVAL}},
      {{"FALLOCATE", EPERM}},
      {{"FALLOCATE", EOPNOTSUPP}},
      {{"FLOCK", ENOLCK}},
      {{"FLOCK", EOPNOTSUPP}},
      {{"FLOCK", kNoLocks}},
      {{"TMPFILE", EOPNOTSUPP}},
      {{"TMPFILE", EISDIR}, {"RENAMEAT2", EINVAL}, {"LINK", ENOSYS}},
  };
  for (const auto& errors : lacks) {
    INFO(errors.front().first << "=" << errors.front().second);
    const TemporaryFolder folder;
    const std::string path = folder / "o.h5";
    const ProcessResult first = annulus_with(with_small("run", {"--output", path}), failing(errors));
    const ProcessResult again = annulus_with(with_small("run", {"--output", path}), failing(errors));
    const ProcessResult forced = annulus_with(with_small("run", {"--output", path, "--force"}), failing(errors));
    INFO(first.err << again.err << forced.err);
    CHECK(first.exit_code == 0);
    CHECK(again.exit_code == 2);
    CHECK(again.err.find("--force replaces it") != std::string::npos);
    CHECK(forced.exit_code == 0);
    CHECK(sorted_names(folder) == Names{"o.h5"});
  }
}

TEST_CASE("a lock that the environment asks for and the file system refuses is told at the start, with what to set") {
  const TemporaryFolder folder;
  std::vector<std::string> environment = failing({{"FLOCK", ENOLCK}});
  environment.emplace_back("HDF5_USE_FILE_LOCKING=TRUE");
  const ProcessResult result = annulus_with(with_small("run", {"--output", folder / "o.h5"}), environment);
  INFO(result.err);
  CHECK(result.exit_code == 2);
  CHECK(result.err.find("No locks available (HDF5_USE_FILE_LOCKING is TRUE; FALSE does without locks)") != std::string::npos);
  CHECK(folder.names().empty());
}

TEST_CASE("generate and the files of bench are written there as well") {
  const TemporaryFolder folder;
  const auto environment = failing({{"RENAMEAT2", EINVAL}, {"LINK", ENOSYS}, {"FSYNC", ENOSYS}, {"FALLOCATE", EINVAL}, {"FLOCK", ENOLCK}});
  CHECK(annulus_with({"generate", "--seq-len", "64", "--heads", "2", "--head-dim", "8", "--output", folder / "i.h5"}, environment)
            .exit_code == 0);
  const ProcessResult bench = annulus_with(
      with_small("bench", {"--repetitions", "1", "--sweep", "causal=false,true", "--csv", folder / "r.csv", "--output", folder / "r.h5"}),
      environment);
  INFO(bench.err);
  CHECK(bench.exit_code == 0);
  CHECK(sorted_names(folder) == Names{"i.h5", "r.csv", "r.h5"});
}

TEST_CASE("a complete result that cannot be published is kept and named, exit code 3") {
  const std::size_t bytes = usual_bytes();
  const std::vector<std::vector<std::pair<std::string, int>>> refusals{
      {{"RENAMEAT2", EACCES}, {"LINK", EACCES}, {"RENAME", EACCES}},
      {{"RENAMEAT2", EINVAL}, {"LINK", ENOSYS}, {"RENAME", ENOSPC}},
      {{"FSYNC", ENOSPC}},
      {{"FSYNC", EDQUOT}},
      {{"FSYNC", EIO}},
      {{"TMPFILE", EOPNOTSUPP}, {"FSYNC", EIO}},
      {{"TMPFILE", EOPNOTSUPP}, {"RENAMEAT2", EACCES}, {"LINK", EACCES}, {"RENAME", EACCES}},
  };
  for (const auto& errors : refusals) {
    for (const int ranks : {1, 2}) {
      INFO(errors.back().first << "=" << errors.back().second << " on " << ranks);
      const TemporaryFolder folder;
      std::vector<std::string> environment = failing(errors);
      const std::vector<std::string> arguments = with_small("run", {"--output", folder / "o.h5"});
      const ProcessResult result = ranks == 1 ? annulus_with(arguments, environment) : launch_annulus(ranks, arguments, environment);
      INFO(result.err);
      CHECK(result.exit_code == 3);
      const std::vector<std::string> names = sorted_names(folder);
      REQUIRE(names.size() == 1);
      CHECK(names[0].starts_with(".o.h5.partial-"));
      CHECK(result.err.find("is kept as '" + (folder / names[0]) + "'") != std::string::npos);
      if (ranks == 1) { CHECK(read_text(folder / names[0]).size() + 1000 > bytes); }
    }
  }
}

TEST_CASE("a complete result that a signal meets on its way to its place is kept and named") {
  const TemporaryFolder folder;
  const ProcessResult result = annulus_with(with_small("run", {"--output", folder / "o.h5"}),
                                            {"LD_PRELOAD=" ANNULUS_FAILING_CALLS, "RAISE_IN_FSYNC=" + std::to_string(SIGTERM)});
  INFO(result.err);
  CHECK(result.exit_code == 128 + SIGTERM);
  REQUIRE(folder.names().size() == 1);
  CHECK(result.err.find("the complete result is kept as '" + (folder / folder.names()[0]) + "'") != std::string::npos);
  CHECK(read_text(folder / folder.names()[0]).size() + 1000 > usual_bytes());
}

TEST_CASE("no room is told before the input is read where it can be reserved") {
  for (const int error : {ENOSPC, EDQUOT, EFBIG}) {
    const TemporaryFolder folder;
    // Reading or computing this would take minutes.
    const ProcessResult result = annulus_with({"run", "--seq-len", "200000", "--heads", "8", "--threads", "1", "--output", folder / "o.h5"},
                                              failing({{"FALLOCATE", error}}), 30);
    INFO(result.err);
    CHECK(result.exit_code == 2);
    CHECK(result.err.find("needs ") != std::string::npos);
    CHECK(sorted_names(folder).empty());
  }
}

TEST_CASE("a disk that fails while ranks send their rows ends the job with exit code 3, no file and no rank waiting") {
  const std::vector<std::string> problem{"run", "--seq-len",  "20000", "--segment-lengths", "100", "--heads",
                                         "8",   "--head-dim", "32",    "--threads",         "1"};
  for (const int ranks : {1, 2, 3}) {
    for (const int after : {0, 1000000, 20000000}) {
      const bool nameless = ranks != 2;
      INFO(ranks << " ranks, after " << after << " bytes, " << (nameless ? "no name" : "a hidden name"));
      const TemporaryFolder folder;
      std::vector<std::string> arguments = problem;
      arguments.insert(arguments.end(), {"--output", folder / "o.h5"});
      const std::vector<std::string> environment =
          failing({{"WRITE", EIO}, {"WRITE_AFTER", after}, {"TMPFILE", nameless ? 0 : EOPNOTSUPP}});
      const ProcessResult result = ranks == 1 ? annulus_with(arguments, environment) : launch_annulus(ranks, arguments, environment);
      INFO(result.err);
      CHECK_FALSE(result.timed_out);
      CHECK(result.exit_code == (after == 0 ? 2 : 3));
      CHECK(result.err.find("Input/output error") != std::string::npos);
      CHECK(sorted_names(folder).empty());
    }
  }
}

TEST_CASE("a bench whose disk fails keeps the rows it had written") {
  const TemporaryFolder folder;
  const std::vector<std::string> arguments =
      with_small("bench", {"--repetitions", "1", "--sweep", "heads=1,2,3,4,5,6", "--csv", folder / "r.csv"});
  const ProcessResult result = annulus_with(arguments, failing({{"WRITE", ENOSPC}, {"WRITE_AFTER", 8000}}));
  INFO(result.err);
  CHECK(result.exit_code == 3);
  CHECK(result.err.find("r.csv' cannot be written: No space left on device") != std::string::npos);
  CHECK(sorted_names(folder) == Names{"r.csv"});
  std::ifstream file(folder / "r.csv");
  int lines = 0;
  for (std::string line; std::getline(file, line);) { ++lines; }
  CHECK((lines >= 3 && lines < 7));
}
