// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/text_result.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include "child.hpp"
#include "hdf5_fixture.hpp"
#include "text_file.hpp"

#include <csignal>
#include <cstdio>
#include <fstream>
#include <string>
#include <sys/resource.h>

namespace {

using namespace annulus;
using test::contains_text;
using test::in_child;
using test::read_text;
using test::TemporaryFolder;

}  // namespace

TEST_CASE("a text result is complete or absent, and replaces another only by force") {
  const TemporaryFolder folder;
  const std::string path = folder.file("rows.csv");
  const std::string text(100000, 'x');
  { const TextResult never_written(path, false); }
  CHECK(folder.names().empty());
  TextResult(path, false).write(text);

  CHECK(read_text(path) == text);
  CHECK_THROWS_WITH(TextResult(path, false), contains_text("exists; --force replaces it"));
  CHECK(read_text(path) == text);
  TextResult(path, true).write("");
  CHECK(read_text(path).empty());
  CHECK_THROWS_AS(TextResult(folder.file("absent/rows.csv"), true), InvalidArgument);
  CHECK(folder.names().size() == 1);
}

TEST_CASE("a text result beyond the limit on a file's size is refused at once if that is known, else when it is written") {
  const TemporaryFolder folder;
  const std::string path = folder.file("rows.csv");
  std::ofstream(path) << "old";
  const auto limited = [&](std::int64_t least_bytes) {
    return in_child([&] {
      std::signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{1000, 1000};
      if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) { ::_exit(98); }
      try {
        TextResult(path, true, least_bytes).write(std::string(100000, 'x'));
      } catch (const Error& error) {
        const std::string message = error.what();
        const bool named = message.find("rows.csv'") != std::string::npos && message.find("File too large") != std::string::npos;
        ::_exit(named ? static_cast<int>(error.code()) : 97);
      }
    });
  };
  const int known = limited(1001);
  const int unknown = limited(10);

  CHECK((WIFEXITED(known) && WEXITSTATUS(known) == 2));
  CHECK((WIFEXITED(unknown) && WEXITSTATUS(unknown) == 3));
  CHECK(read_text(path) == "old");
  CHECK(folder.names().size() == 1);
}

TEST_CASE("a text result grows: each write replaces the one before, and nothing of another program") {
  const TemporaryFolder folder;
  const std::string path = folder.file("rows.csv");
  TextResult result(path, false);
  CHECK_FALSE(std::ifstream(path).good());
  result.write("one\n");
  CHECK(read_text(path) == "one\n");
  result.write("one\ntwo\n");
  CHECK(read_text(path) == "one\ntwo\n");
  CHECK(folder.names().size() == 1);

  std::remove(path.c_str());  // rows that somebody has moved away are no reason to lose the next ones
  result.write("one\ntwo\nthree\n");
  CHECK(read_text(path) == "one\ntwo\nthree\n");

  std::remove(path.c_str());
  std::ofstream(path) << "somebody else's";
  CHECK_THROWS_WITH(result.write("four"), contains_text("created by another program") && contains_text("is kept as '"));
  CHECK(read_text(path) == "somebody else's");
  CHECK(folder.names().size() == 2);
}
