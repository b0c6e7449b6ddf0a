// SPDX-License-Identifier: Apache-2.0
#include "io/unfinished_path.hpp"

#include <annulus/bench/bench_file.hpp>
#include <annulus/io/result_file.hpp>
#include <annulus/io/text_result.hpp>
#include <annulus_test.hpp>

#include "child.hpp"
#include "hdf5_fixture.hpp"
#include "text_file.hpp"

#include <algorithm>
#include <csignal>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace {

using namespace annulus;
using test::read_text;
using test::TemporaryFolder;

mode_t mode_of(const std::string& path) {
  struct stat status{};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return status.st_mode & 07777U;
}

/// Whether files of this folder's file system can do without a name.
bool allows_nameless_files(const TemporaryFolder& folder) {
  const int descriptor = ::open(folder.file(".").c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (descriptor >= 0) { ::close(descriptor); }
  return descriptor >= 0;
}

void write_all(const UnfinishedPath& place, const std::string& text) {
  REQUIRE(::write(place.descriptor(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
}

}  // namespace

TEST_CASE("a process that is killed leaves nothing of what it was writing") {
  const TemporaryFolder folder;
  if (!allows_nameless_files(folder)) { return test::skip("this file system names every file"); }
  const Problem problem{.batch = 1, .seq_len = 50, .heads = 2, .kv_heads = 2, .head_dim = 8};
  const std::vector<std::function<void()>> writers{
      [&] {
        ResultFile file(folder.file("o.h5"), false, problem);
        const std::vector<float> rows(static_cast<std::size_t>(50 * 2 * 8), 1.0F);
        file.write_output({0, 0, 50, 0, 2}, rows.data());
        std::raise(SIGKILL);
      },
      [&] {
        TextResult file(folder.file("r.csv"), false, 100);
        std::raise(SIGKILL);
      },
      [&] {
        BenchFile file(folder.file("b.h5"), false, 100000);
        std::raise(SIGKILL);
      },
  };
  for (std::size_t writer = 0; writer < writers.size(); ++writer) {
    INFO("writer " << writer);
    const int status = test::in_child(writers[writer]);
    CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
    CHECK(folder.names().empty());
  }
}

TEST_CASE("what has lost its name is published whole, and can be written again") {
  const TemporaryFolder folder;
  const std::string path = folder.file("o.txt");
  UnfinishedPath place(path, false);
  write_all(place, "first ");
  place.lose_name();
  CHECK(folder.names().empty() == allows_nameless_files(folder));
  write_all(place, "and last");
  place.publish();
  CHECK(read_text(path) == "first and last");
  CHECK(folder.names().size() == 1);

  place.renew();
  place.lose_name();
  place.restart();
  place.lose_name();
  write_all(place, "again");
  CHECK(read_text(path) == "first and last");
  place.publish();
  CHECK(read_text(path) == "again");
  CHECK(folder.names().size() == 1);
}

TEST_CASE("somebody else's descriptor goes on where it was when the name is lost") {
  const TemporaryFolder folder;
  const std::string path = folder.file("o.txt");
  UnfinishedPath place(path, false);
  const int other = ::open(place.temporary().c_str(), O_RDWR | O_CLOEXEC);
  REQUIRE(other >= 0);
  REQUIRE(::write(other, "0123456789", 10) == 10);
  REQUIRE(::lseek(other, 4, SEEK_SET) == 4);
  place.lose_name(other);
  REQUIRE(::write(other, "four", 4) == 4);
  ::close(other);
  place.publish();
  CHECK(read_text(path) == "0123four89");
}

TEST_CASE("a result without a name is refused a place that another took, and kept") {
  const TemporaryFolder folder;
  const std::string path = folder.file("o.txt");
  UnfinishedPath place(path, false);
  place.lose_name();
  write_all(place, "ours");
  std::ofstream(path) << "another's";
  CHECK_THROWS_WITH(place.publish(), test::contains_text("was created by another program meanwhile; the complete result is kept as '"));
  CHECK(read_text(path) == "another's");
  CHECK(read_text(place.temporary()) == "ours");
}

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

TEST_CASE("the signal handler removes the files of this process and spares other processes'") {
  const TemporaryFolder folder;
  const int status = test::in_child([&] {
    std::signal(SIGTERM, [](int) {
      remove_unfinished_results();
      ::_exit(7);
    });
    const UnfinishedPath first(folder.file("first.h5"), false);
    const UnfinishedPath second(folder.file("second.h5"), false);
    if (folder.names().size() != 2 || ::chdir("/") != 0) { ::_exit(98); }
    std::raise(SIGTERM);
  });
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 7));
  CHECK(folder.names().empty());

  UnfinishedPath ours(folder.file("ours.h5"), false);
  test::in_child([] { remove_unfinished_results(); });
  CHECK(folder.names().size() == 1);
  ours.publish();
  remove_unfinished_results();
  CHECK(std::filesystem::exists(folder.file("ours.h5")));
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
