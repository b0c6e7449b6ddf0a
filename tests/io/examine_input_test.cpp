// SPDX-License-Identifier: Apache-2.0
// Files on which HDF5 crashes or does not come to an end, made by a filter that does so when it decodes.
#include <annulus/io/examine_input.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include "hdf5_fixture.hpp"

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

namespace {

using namespace annulus;
using test::contains_text;
using test::TemporaryFolder;

constexpr H5Z_filter_t kFilter = 301;

enum class Decoding { works, fails, segfaults, aborts, exits, loops, sleeps };
Decoding decoding = Decoding::works;

std::size_t decode(unsigned flags, std::size_t, const unsigned*, std::size_t bytes, std::size_t*, void**) {
  if ((flags & H5Z_FLAG_REVERSE) == 0) { return bytes; }
  switch (decoding) {
    case Decoding::works:
      return bytes;
    case Decoding::fails:
      return 0;
    case Decoding::segfaults:
      std::raise(SIGSEGV);
      break;
    case Decoding::aborts:
      std::abort();
    case Decoding::exits:
      ::_exit(0);
    case Decoding::loops:
      for (volatile bool forever = true; forever;) {}
      break;
    case Decoding::sleeps:
      ::sleep(100);
      break;
  }
  return bytes;
}

std::string examined(const std::string& path, Decoding how, const ExamineLimits& limits = {}) {
  decoding = how;
  try {
    examine_input(path, InputUse::forward, limits);
  } catch (const InvalidArgument& error) {
    CHECK_THAT(error.what(), contains_text(path));
    return error.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE("an input that crashes HDF5 or keeps it busy for ever is refused by a process that lives on", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("input.h5");
  const test::RegisteredFilter filter(kFilter, "annulus test filter", decode);
  test::write_filtered(path, kFilter, {1, 8, 2, 4}, 1, {1, 3, 1, 4});
  const auto start = std::chrono::steady_clock::now();

  CHECK(examined(path, Decoding::works) == "accepted");
  CHECK_THAT(examined(path, Decoding::fails), contains_text("/q at [0, 0, 0, 0] is damaged"));
  CHECK_THAT(examined(path, Decoding::segfaults), contains_text("crashes on it (Segmentation fault)"));
  CHECK_THAT(examined(path, Decoding::aborts), contains_text("crashes on it (Aborted)"));
  CHECK_THAT(examined(path, Decoding::exits), contains_text("crashes on it"));
  CHECK_THAT(examined(path, Decoding::loops, {.cpu_s = 1, .silent_s = 60}), contains_text("does not come to an end"));
  CHECK_THAT(examined(path, Decoding::sleeps, {.cpu_s = 5, .silent_s = 1}), contains_text("nothing came from it for 1 seconds"));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(60));
  CHECK(::waitpid(-1, nullptr, WNOHANG) == -1);  // no child is left
}

TEST_CASE("what is wrong with an input is said as opening it says it", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("absent.h5");

  CHECK(examined(path, Decoding::works) == test::refusal(path));
  CHECK_THAT(examined(path, Decoding::works), contains_text("No such file or directory"));
  CHECK(examined(std::string(ANNULUS_TEST_DATA) + "/attention_sample.h5", Decoding::works) == "accepted");
}

TEST_CASE("the examination does not depend on whether the parent waits for its children", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("input.h5");
  const test::RegisteredFilter filter(kFilter, "annulus test filter", decode);
  test::write_filtered(path, kFilter, {1, 8, 2, 4}, 1, {1, 3, 1, 4});

  std::signal(SIGCHLD, SIG_IGN);
  CHECK(examined(path, Decoding::works) == "accepted");
  CHECK_THAT(examined(path, Decoding::segfaults), contains_text("crashes on it"));
  std::signal(SIGCHLD, SIG_DFL);
}
