// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/file_identity.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include "hdf5_fixture.hpp"

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using namespace annulus;
using test::contains_text;
using test::TemporaryFolder;

}  // namespace

TEST_CASE("a file is the same under every name that leads to it, also before it exists", "[io]") {
  const TemporaryFolder folder;
  const std::string file = folder.file("file");
  std::ofstream(file) << "x";
  fs::create_symlink("file", folder.file("link"));
  fs::create_hard_link(file, folder.file("hard"));
  fs::create_directory(folder.file("sub"));
  fs::create_directory_symlink("sub", folder.file("sub-link"));
  fs::create_symlink("later", folder.file("dangling"));
  fs::create_symlink("dangling", folder.file("dangling-twice"));
  fs::create_symlink("circle", folder.file("circle"));

  for (const char* name : {"link", "hard", "./file", "sub/../file", "sub-link/../link"}) {
    INFO(name);
    CHECK(identify_file(folder.file(name)) == identify_file(file));
  }
  for (const char* name : {"./later", "sub/../later", "dangling", "dangling-twice"}) {
    INFO(name);
    CHECK(identify_file(folder.file(name)) == identify_file(folder.file("later")));
  }
  CHECK(identify_file(folder.file("sub/later")) == identify_file(folder.file("sub-link/later")));
  CHECK(identify_file(folder.file("no/such/file")) == identify_file(folder.file("no/./such/file")));
  for (const char* other : {"later", "sub", "sub/file", "no/file", "circle"}) {
    INFO(other);
    CHECK(identify_file(folder.file(other)) != identify_file(file));
  }
}

TEST_CASE("a written file that has another use is refused with both, two that are read are not", "[io]") {
  const TemporaryFolder folder;
  const std::string file = folder.file("file");
  const std::string other = folder.file("other");
  std::ofstream(file) << "x";
  const auto refusal = [](const std::vector<NamedFile>& files) -> std::string {
    try {
      require_distinct_files(files);
    } catch (const InvalidArgument& error) { return error.what(); }
    return "accepted";
  };
  const NamedFile input{"--input", file, FileUse::read};
  const NamedFile config{"--config", file, FileUse::read};
  const NamedFile output{"--output", file, FileUse::written};
  const NamedFile table{"--csv", file, FileUse::written};
  const NamedFile out{"standard output", file, FileUse::printed};
  const NamedFile err{"standard error", file, FileUse::printed};

  CHECK(refusal({input, config}) == "accepted");
  CHECK(refusal({out, err}) == "accepted");
  CHECK(refusal({out, err, input, {"--output", other, FileUse::written}}).find("standard output is the same file as --input") == 0);
  CHECK_THAT(refusal({input, output}), contains_text("--output '" + file + "' is the same file as --input '" + file + "', which is read") &&
                                           contains_text("--force does not allow that"));
  CHECK_THAT(refusal({config, table}), contains_text("--csv") && contains_text("--config"));
  CHECK_THAT(refusal({output, table}), contains_text("--csv") && contains_text("--output"));
  CHECK_THAT(refusal({out, output}), contains_text("--output") && contains_text("standard output"));
  CHECK_THAT(refusal({{"--output", other, FileUse::written}, {"--csv", folder.file("./other"), FileUse::written}}),
             contains_text("same file"));
}
