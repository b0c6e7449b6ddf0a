// SPDX-License-Identifier: Apache-2.0
#include "io/unfinished_path.hpp"

#include <annulus/io/result_file.hpp>
#include <annulus_test.hpp>

#include "child.hpp"
#include "hdf5_fixture.hpp"
#include "text_file.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

namespace {

using namespace annulus;
using test::read_text;
using test::TemporaryFolder;

mode_t mode_of(const std::string& path) {
  struct stat status{};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return status.st_mode & 07777U;
}

}  // namespace

TEST_CASE("temporary files of one result have unlike names, which no process id tells") {
  const TemporaryFolder folder;
  const std::string path = folder.file("o.h5");
  std::set<std::string> names;
  for (int i = 0; i < 50; ++i) { names.insert(UnfinishedPath(path, false).temporary()); }
  CHECK(names.size() == 50);
  CHECK(folder.names().empty());

  const UnfinishedPath first(path, false);
  const UnfinishedPath second(path, false);
  CHECK(first.temporary() != second.temporary());
  CHECK(folder.names().size() == 2);
}

TEST_CASE("only what was created is removed, by the destructor and by the signal handler") {
  const TemporaryFolder folder;
  const std::string path = folder.file("o.h5");
  std::string temporary;
  {
    const UnfinishedPath place(path, false);
    temporary = place.temporary();
    REQUIRE(::unlink(temporary.c_str()) == 0);
    std::ofstream(temporary) << "another's";
    remove_unfinished_results();
    CHECK(read_text(temporary) == "another's");
  }
  CHECK(read_text(temporary) == "another's");
}

TEST_CASE("a result that replaces a file takes over its mode, and is nobody else's to read before") {
  const TemporaryFolder folder;
  const std::string path = folder.file("o.h5");
  for (const mode_t mode : {0600U, 0644U, 0640U, 0666U, 0400U, 0444U}) {
    std::ofstream(path) << "old";
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    UnfinishedPath place(path, true);
    CHECK(mode_of(place.temporary()) == 0600);
    place.publish();
    CHECK(mode_of(path) == mode);
    place.renew();
    place.publish();
    CHECK(mode_of(path) == mode);
    CHECK(folder.names().size() == 1);
    REQUIRE(::chmod(path.c_str(), 0600) == 0);
  }
}

TEST_CASE("a new result has the mode that the process gives to new files") {
  const TemporaryFolder folder;
  const mode_t mask = ::umask(0027);
  UnfinishedPath place(folder.file("o.h5"), true);
  place.publish();
  CHECK(mode_of(folder.file("o.h5")) == 0640);
  std::filesystem::remove(folder.file("o.h5"));  // what is written again after it was moved away as well
  place.renew();
  place.publish();
  ::umask(mask);
  CHECK(mode_of(folder.file("o.h5")) == 0640);
}

TEST_CASE("a group that a replaced file's group cannot be given to gets what all others get") {
  const TemporaryFolder folder;
  const std::string path = folder.file("o.h5");
  if (::geteuid() != 0) { return test::skip("only root can make another's file"); }
  std::filesystem::permissions(folder.file("."), std::filesystem::perms::all);
  std::ofstream(path) << "old";
  REQUIRE(::chown(path.c_str(), 65534, 0) == 0);
  REQUIRE(::chmod(path.c_str(), 0660) == 0);
  const int status = test::in_child([&] {
    if (::setgid(65534) != 0 || ::setuid(65534) != 0) { ::_exit(98); }
    UnfinishedPath(path, true).publish();
  });
  CHECK(status == 0);
  CHECK(mode_of(path) == 0600);
}

TEST_CASE("a long name is cut between letters of UTF-8") {
  const TemporaryFolder folder;
  std::string name(199, 'n');
  for (int i = 0; i < 20; ++i) { name += "\xC3\xB6"; }
  const std::string temporary = std::filesystem::path(UnfinishedPath(folder.file(name), false).temporary()).filename();
  CHECK(temporary.starts_with("." + std::string(199, 'n') + ".partial-"));
}
