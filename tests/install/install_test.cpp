// SPDX-License-Identifier: Apache-2.0
#include <annulus_test.hpp>

#include "../app/process.hpp"
#include "../text_file.hpp"

#include <string>
#include <vector>

using annulus::test::ProcessResult;
using annulus::test::read_text;
using annulus::test::run_process;
using annulus::test::TemporaryFolder;

namespace {

ProcessResult run_well(const std::vector<std::string>& command) {
  ProcessResult result = run_process(command, 100);
  INFO(result.out << result.err);
  REQUIRE(result.exit_code == 0);
  return result;
}

}  // namespace

TEST_CASE("a project finds the installed package, links its library and runs; the installed program finds its presets") {
  const TemporaryFolder folder;
  const std::string prefix = folder / "prefix";
  run_well({ANNULUS_CMAKE, "--install", ANNULUS_BUILD_FOLDER, "--prefix", prefix});
  run_well({ANNULUS_CMAKE, "-S", ANNULUS_CONSUMER, "-B", folder / "build", "-G", "Ninja", "-DCMAKE_PREFIX_PATH=" + prefix,
            std::string("-DCMAKE_CXX_FLAGS=") + ANNULUS_CXX_FLAGS});
  run_well({ANNULUS_CMAKE, "--build", folder / "build"});
  // Three hops of four shards of 8 rows, K and V, of 64 numbers of 4 bytes.
  CHECK(run_well({folder / "build/consumer"}).out.find(" moves 49152 bytes\n") != std::string::npos);
  CHECK(run_well({prefix + "/bin/annulus", "plan", "--preset", "longnet", "--seq-len", "4096"}).exit_code == 0);
  CHECK(read_text(prefix + "/share/man/man1/annulus.1").starts_with(".TH ANNULUS 1 "));
  CHECK(read_text(prefix + "/share/bash-completion/completions/annulus").find("complete -o filenames -F _annulus annulus\n") !=
        std::string::npos);
}
