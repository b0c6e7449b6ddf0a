// SPDX-License-Identifier: Apache-2.0
// Places that need another user, a mount or a limit to be made: what keeps a result from being written is told at the start. Where a place
// cannot be made, its test is skipped.
#include <annulus_test.hpp>

#include "program.hpp"

#include <filesystem>
#include <fstream>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

using namespace annulus::test;

namespace {

/// Reading or computing this takes minutes.
const std::string kRun = "run --seq-len 20000 --heads 8 --head-dim 64";

void check_refused(const std::string& line, const std::string& reason) {
  const ProcessResult result = run_bash(line, {}, 30);
  INFO(line << "\n" << result.err);
  CHECK(result.exit_code == 2);
  CHECK(result.err.find(reason) != std::string::npos);
  CHECK(result.out.empty());
  CHECK(result.seconds < 5);  // of a computation of minutes; the rest is the machine's
}

bool runs(const std::string& line) { return run_bash(line).exit_code == 0; }

}  // namespace

TEST_CASE("a result beyond the limit on a file's size is refused at the start") {
  const TemporaryFolder folder;
  const std::string line = "ulimit -f 1000; exec \"$A\" ";
  check_refused(line + kRun + " --output '" + (folder / "o.h5") + "'", "File too large");
  check_refused(line + "generate --seq-len 20000 --heads 8 --head-dim 64 --output '" + (folder / "o.h5") + "'", "File too large");
  check_refused(line + kRun + " --output '" + (folder / "o.h5") + "'", "o.h5");
  CHECK(folder.names().empty());
  const ProcessResult launched =
      run_process({ANNULUS_LAUNCH, "3", "bash", "-c",  // the launcher and MPI need larger files than the first limit would let them have
                   "ulimit -f 30000; exec " ANNULUS_PROGRAM " " + kRun + " --threads 1 --output '" + (folder / "o.h5") + "'"},
                  60);
  INFO(launched.err);
  CHECK(launched.exit_code == 2);
  CHECK(folder.names().empty());
}

TEST_CASE("a file system without room for the result is found at the start") {
  const TemporaryFolder folder;
  const std::string mount = "mount -t tmpfs -o size=1m none '" + folder.path() + "' && ";
  if (!runs("unshare --user --map-root-user --mount bash -c \"" + mount + "true\"")) { return skip("no tmpfs can be mounted here"); }
  const auto inside = [&](const std::string& command) {
    return "A=$A exec unshare --user --map-root-user --mount bash -c \"" + mount + command + "\"";
  };
  const std::string output = " --output '" + (folder / "o.h5") + "'";
  check_refused(inside("exec \\$A " + kRun + output), "No space left on device");
  check_refused(inside("exec \\$A generate --seq-len 20000 --heads 8 --head-dim 64" + output), "No space left on device");
  const std::string filled = "head -c 1048576 /dev/zero > '" + (folder / "fill") + "' 2>/dev/null; ";
  check_refused(inside(filled + "exec \\$A bench --seq-len 60000 --heads 8 --threads 1" + output), "No space left on device");
  check_refused(inside(filled + "exec \\$A bench --seq-len 60000 --heads 8 --threads 1 --csv '" + (folder / "r.csv") + "'"),
                "No space left on device");
  const ProcessResult fits = run_bash(inside("exec \\$A run --seq-len 64 --heads 2 --head-dim 8 --threads 1" + output));
  INFO(fits.err);
  CHECK(fits.exit_code == 0);
}

TEST_CASE("a nearly full disk never keeps half a JSON document with exit code 0") {
  const TemporaryFolder folder;
  const std::string mount = "mount -t tmpfs -o size=64k none '" + folder.path() + "' && ";
  if (!runs("unshare --user --map-root-user --mount bash -c \"" + mount + "true\"")) { return skip("no tmpfs can be mounted here"); }
  const ProcessResult result = run_bash("A=$A exec unshare --user --map-root-user --mount bash -c \"" + mount +
                                        "exec \\$A plan --seq-len 4096 --ranks 600 --json > '" + (folder / "plan.json") + "'\"");
  INFO(result.err);
  CHECK(result.exit_code == 3);
  CHECK(result.err.find("standard output cannot be written: No space left on device") != std::string::npos);
}

TEST_CASE("another user's file in a folder with the sticky bit is refused at the start, whatever --force says") {
  if (geteuid() != 0 || !runs("setpriv --reuid=65534 --clear-groups true")) { return skip("no other user can be had here"); }
  const TemporaryFolder folder;
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0777) | std::filesystem::perms::sticky_bit);
  std::ofstream(folder / "o.h5") << "precious";
  std::filesystem::permissions(folder / "o.h5", std::filesystem::perms(0666));
  // The program must be one that the other user may read.
  const std::string program = folder / "annulus";
  std::filesystem::copy_file(ANNULUS_PROGRAM, program);
  const std::string line = "exec setpriv --reuid=65534 --clear-groups '" + program + "' ";
  const std::string output = " --output '" + (folder / "o.h5") + "' --force";
  check_refused(line + kRun + output, "belongs to another user");
  check_refused(line + "bench --seq-len 60000 --heads 8 --threads 1" + output, "belongs to another user");
  CHECK(read_text(folder / "o.h5") == "precious");
  CHECK(sorted_names(folder) == std::vector<std::string>{"annulus", "o.h5"});
}

TEST_CASE("a file that is a mount point cannot be replaced, which is known at the start") {
  const TemporaryFolder folder;
  std::ofstream(folder / "o.h5") << "precious";
  std::ofstream(folder / "mounted") << "precious";
  const std::string mount = "mount --bind '" + (folder / "mounted") + "' '" + (folder / "o.h5") + "' && ";
  if (!runs("unshare --user --map-root-user --mount bash -c \"" + mount + "true\"")) { return skip("nothing can be mounted here"); }
  check_refused("A=$A exec unshare --user --map-root-user --mount bash -c \"" + mount + "exec \\$A " + kRun + " --force --output '" +
                    (folder / "o.h5") + "'\"",
                "is a mount point");
  CHECK(read_text(folder / "mounted") == "precious");
}
