// SPDX-License-Identifier: Apache-2.0
// The files that the program is told to read and write, as users name them.
#include <annulus_test.hpp>

#include "process.hpp"

#include <hdf5.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

using namespace annulus::test;

namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kSmall{"--seq-len", "20", "--heads", "1", "--head-dim", "4", "--threads", "1"};

std::vector<std::string> joined(std::vector<std::string> first, const std::vector<std::string>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

/// A command line in which $A is the program.
ProcessResult in_shell(const std::string& script, double limit_s = 60) {
  return run_process({"bash", "-c", script}, limit_s, {std::string("A=") + ANNULUS_PROGRAM, std::string("L=") + ANNULUS_LAUNCH});
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void check_refused(const ProcessResult& result, const std::string& part) {
  INFO(result.out << result.err);
  CHECK(result.exit_code == 2);
  const std::size_t first = result.err.find(part);
  CHECK(first != std::string::npos);
  CHECK(result.err.find(part, first + 1) == std::string::npos);
}

/// A folder with the input d.h5.
class Inputs {
 public:
  Inputs() {
    const std::vector<std::string> small(kSmall.begin(), kSmall.end() - 2);
    REQUIRE(run_process(joined({ANNULUS_PROGRAM, "generate", "--output", folder_ / "d.h5"}, small), 60).exit_code == 0);
    before_ = contents(folder_ / "d.h5");
  }
  std::string operator/(const std::string& name) const { return folder_ / name; }
  const std::string& path() const { return folder_.path(); }
  bool unchanged() const { return contents(folder_ / "d.h5") == before_; }

 private:
  TemporaryFolder folder_;
  std::string before_;
};

/// A python3 that has h5py; empty if there is none.
std::string python_with_h5py() {
  for (const char* candidate : {"python3", "/usr/bin/python3"}) {
    if (run_process({candidate, "-c", "import h5py"}, 60).exit_code == 0) { return candidate; }
  }
  return {};
}

/// The first Python program in a document.
std::string recipe_of(const std::string& document) {
  const std::string text = contents(document);
  const std::size_t begin = text.find("```python\n");
  REQUIRE(begin != std::string::npos);
  return text.substr(begin + 10, text.find("```", begin + 10) - begin - 10);
}

}  // namespace

TEST_CASE("a file that is read is never written, whatever its name and with --force") {
  const Inputs inputs;
  fs::create_symlink("d.h5", inputs / "link.h5");
  fs::create_hard_link(inputs / "d.h5", inputs / "hard.h5");
  std::ofstream(inputs / "job.toml") << "input = \"" << inputs / "d.h5" << "\"\n";
  const auto refused = [&](const std::vector<std::string>& arguments, const std::string& part) {
    check_refused(run_process(joined({ANNULUS_PROGRAM}, arguments), 60), part);
    CHECK(inputs.unchanged());
  };
  const auto refused_together = [&](const std::vector<std::string>& arguments, const std::string& part) {
    check_refused(run_process(joined({ANNULUS_LAUNCH, "3", ANNULUS_PROGRAM}, arguments), 60), part);
    refused(arguments, part);
  };

  for (const char* name : {"d.h5", "link.h5", "hard.h5", "./d.h5"}) {
    refused({"run", "--input", inputs / "d.h5", "--output", inputs / name, "--force"}, "is the same file as --input");
    refused({"run", "--input", inputs / name, "--output", inputs / "d.h5", "--force"}, "is the same file as --input");
  }
  refused_together({"run", "--input", inputs / "d.h5", "--output", inputs / "link.h5", "--force"}, "is the same file as --input");
  refused({"bench", "--input", inputs / "d.h5", "--csv", inputs / "link.h5", "--force"}, "--csv");
  refused({"run", "--config", inputs / "job.toml", "--output", inputs / "d.h5", "--force"}, "is the same file as --input");
  const std::string config = contents(inputs / "job.toml");
  refused({"run", "--config", inputs / "job.toml", "--output", inputs / "job.toml", "--force"}, "is the same file as --config");
  refused({"generate", "--config", inputs / "job.toml", "--output", inputs / "job.toml", "--force"}, "is the same file as --config");
  refused({"bench", "--csv", inputs / "new", "--output", inputs / "./new"}, "is the same file as --output");
  CHECK(contents(inputs / "job.toml") == config);

  const hid_t outer = H5Fcreate((inputs / "outer.h5").c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  for (const char* name : {"q", "k", "v"}) { REQUIRE(H5Lcreate_external("d.h5", name, outer, name, H5P_DEFAULT, H5P_DEFAULT) >= 0); }
  H5Fclose(outer);
  refused_together({"run", "--input", inputs / "outer.h5", "--output", inputs / "d.h5", "--force"},
                   "is the same file as a part of --input");
}

TEST_CASE("standard output that goes into a file of the run is refused") {
  const Inputs inputs;

  const ProcessResult input = in_shell("cd " + inputs.path() + " && $A check --input d.h5 >> d.h5");
  check_refused(input, "standard output is the same file as --input 'd.h5'");
  CHECK(inputs.unchanged());
  check_refused(in_shell("cd " + inputs.path() + " && touch o.h5 && $A run --seq-len 20 --heads 1 --output o.h5 --force >> o.h5"),
                "--output 'o.h5' is the same file as standard output");
  CHECK(in_shell("cd " + inputs.path() + " && $A run --input d.h5 --output o.h5 --force > log 2>&1").exit_code == 0);
}

TEST_CASE("a configuration that is no readable file is refused with the system's reason") {
  const Inputs inputs;
  const std::string folder = inputs / "job.toml";
  fs::create_directory(folder);
  const auto refused = [&](const std::string& path, const std::string& reason) {
    check_refused(run_process(joined({ANNULUS_PROGRAM, "run", "--config", path}, kSmall), 60), reason);
    check_refused(run_process({ANNULUS_PROGRAM, "run", "--config", path, "--print-config"}, 60), reason);
  };

  refused(folder, "job.toml': Is a directory");
  check_refused(run_process({ANNULUS_LAUNCH, "2", ANNULUS_PROGRAM, "run", "--config", folder}, 60), "job.toml': Is a directory");
  check_refused(run_process({ANNULUS_LAUNCH, "2", ANNULUS_PROGRAM, "plan", "--config", folder}, 60), "job.toml': Is a directory");
  refused(inputs / "absent.toml", "absent.toml': No such file or directory");
  refused(inputs / "d.h5/x.toml", "Not a directory");
  refused("/dev/null", "/dev/null' is a device");
  fs::create_symlink("loop", inputs / "loop");
  refused(inputs / "loop", "Too many levels of symbolic links");
  std::ofstream(inputs / "huge.toml") << "# ";
  fs::resize_file(inputs / "huge.toml", 17U << 20U);
  refused(inputs / "huge.toml", "more than 16777216 bytes");
}

TEST_CASE("what a message quotes of a configuration does not break its line") {
  const Inputs inputs;
  for (const char* text : {"causal = tru\n", "\"a\\nb\" = 1\n", "dtype = \"fp\\n32\"\n"}) {
    std::ofstream(inputs / "job.toml") << text;
    check_refused(run_process({ANNULUS_PROGRAM, "run", "--config", inputs / "job.toml"}, 60), "\\x0a");
  }
}

TEST_CASE("a configuration that may not be read is refused with the system's reason") {
  if (geteuid() != 0) {
    skip("only root can become another user");
    return;
  }
  const Inputs inputs;
  std::ofstream(inputs / "secret.toml") << "heads = 2\n";
  fs::permissions(inputs.path(), fs::perms::all);
  fs::permissions(inputs / "secret.toml", fs::perms::owner_read);
  const std::string other = "setpriv --reuid=65534 --clear-groups ";
  if (in_shell(other + "$A info").exit_code != 0) {
    skip("another user cannot run the program");
    return;
  }

  check_refused(in_shell(other + "$A run --config " + (inputs / "secret.toml")), "secret.toml': Permission denied");
}

TEST_CASE("a configuration comes through a pipe as through a file") {
  const Inputs inputs;
  const auto value_of = [](const ProcessResult& result) {
    INFO(result.err);
    CHECK(result.exit_code == 0);
    return result.out.find("heads = 6\n") != std::string::npos;
  };

  CHECK(value_of(in_shell("$A run --config <(echo 'heads = 6') --print-config")));
  CHECK(value_of(in_shell("echo 'heads = 6' | $A run --config /dev/stdin --print-config")));
  check_refused(in_shell("$A run --config <(echo 'head = 6')"), ":1: unknown key head");
}

TEST_CASE("under a launcher rank 0 reads a pipe and all ranks have what it read") {
  const Inputs inputs;
  const std::string pipe = inputs / "pipe";
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  const std::string text = "seq-len = 33\\nheads = 2\\nhead-dim = 4\\nthreads = 1\\n";

  for (const char* ranks : {"2", "3"}) {
    const ProcessResult named =
        in_shell("printf '" + text + "' > " + pipe + " & $L " + ranks + " $A check --config " + pipe + " --timeout 20");
    INFO(named.err);
    CHECK(named.exit_code == 0);
    CHECK(named.out.find("rows 33/33") != std::string::npos);
    const ProcessResult standard = in_shell("printf '" + text + "' | $L " + ranks + " $A check --config /dev/stdin --timeout 20");
    INFO(standard.err);
    CHECK(standard.exit_code == 0);
    CHECK(standard.out.find("rows 33/33") != std::string::npos);
    check_refused(in_shell("echo 'heads = 0' > " + pipe + " & $L " + ranks + " $A check --config " + pipe), "--heads 0 is below 1");
  }
}

TEST_CASE("the README's recipe writes a bf16 file that is read to the bit") {
  const std::string python = python_with_h5py();
  if (python.empty()) {
    skip("no python3 with h5py");
    return;
  }
  const TemporaryFolder folder;
  const std::string recipe = recipe_of(ANNULUS_README);
  std::ofstream(folder / "write.py")
      << "import numpy\nq, k, v = numpy.random.default_rng(5).standard_normal((3, 2, 1, 1, 8)).astype('f4')\n"
      << recipe;
  // Of one key the output is its value.
  std::ofstream(folder / "compare.py") << "exec(open('write.py').read())\n"
                                          "with h5py.File('o.h5') as f:\n"
                                          "    o = np.zeros(v.shape, '<u2')\n"
                                          "    f['o'].id.read(h5py.h5s.ALL, h5py.h5s.ALL, o, mtype=f['o'].id.get_type())\n"
                                          "    assert f['o'].id.get_type().get_ebias() == 127 and (o == bits(v)).all()\n";

  const ProcessResult result =
      in_shell("cd " + folder.path() + " && " + python + " write.py && $A run --input qkv.h5 --output o.h5 && " + python + " compare.py");

  INFO(result.out << result.err);
  CHECK(result.exit_code == 0);
  CHECK(result.out.find("bf16") != std::string::npos);
}

TEST_CASE("the recipe for arrays of other programs writes what run takes, and reads what it gives") {
  const std::string python = python_with_h5py();
  if (python.empty()) {
    skip("no python3 with h5py");
    return;
  }
  const TemporaryFolder folder;
  std::ofstream(folder / "recipe.py") << recipe_of(ANNULUS_CONFIGS_README);
  std::ofstream(folder / "write.py") << "import numpy\n"
                                        "q, k, v = numpy.random.default_rng(5).standard_normal((3, 2, 50, 6, 16))\n"
                                        "exec(open('recipe.py').read())\n";
  // The first group of heads attends inside segments of 2048 tokens, undilated: all of 50.
  std::ofstream(folder / "compare.py") << "exec(open('write.py').read())\n"
                                          "o, lse = result()\n"
                                          "assert o.shape == (2, 50, 6, 16) and lse.shape == (2, 6, 50)\n"
                                          "scores = numpy.einsum('bqd,bkd->bqk', q[:, :, 0], k[:, :, 0]) / 4\n"
                                          "weights = numpy.exp(scores)\n"
                                          "sums = weights.sum(-1)\n"
                                          "expected = numpy.einsum('bqk,bkd->bqd', weights, v[:, :, 0]) / sums[..., None]\n"
                                          "assert abs(o[:, :, 0] - expected).max() < 1e-5\n"
                                          "assert abs(lse[:, 0] - numpy.log(sums)).max() < 1e-5\n";

  const ProcessResult result = in_shell("cd " + folder.path() + " && " + python +
                                        " write.py && $A run --preset hybrid --input qkv.h5 --output o.h5 && " + python + " compare.py");

  INFO(result.out << result.err);
  CHECK(result.exit_code == 0);
}

TEST_CASE("an input of fewer rows than heads is read as it is, with a warning from one rank") {
  const TemporaryFolder folder;
  REQUIRE(run_process({ANNULUS_PROGRAM, "generate", "--seq-len", "3", "--heads", "4", "--head-dim", "8", "--output", folder / "d.h5"}, 60)
              .exit_code == 0);
  for (const std::vector<std::string>& launch : {std::vector<std::string>{}, std::vector<std::string>{ANNULUS_LAUNCH, "2"}}) {
    const ProcessResult result = run_process(joined(launch, {ANNULUS_PROGRAM, "check", "--input", folder / "d.h5", "--threads", "1"}), 60);
    INFO(result.err);
    CHECK(result.exit_code == 0);
    const std::size_t first = result.err.find("has 3 rows and 4 heads: is it [batch, seq, heads, head_dim]?");
    CHECK(first != std::string::npos);
    CHECK(result.err.find("has 3 rows", first + 1) == std::string::npos);
  }
}
