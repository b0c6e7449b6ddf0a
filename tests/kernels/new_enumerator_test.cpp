// SPDX-License-Identifier: Apache-2.0
#include <annulus_test.hpp>

#include "../app/process.hpp"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

using namespace annulus::test;

namespace {

const std::string kSources = ANNULUS_SOURCES;

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// The kernels' headers, with one more enumerator behind `last` of the enumeration.
void copy_headers(const TemporaryFolder& folder, const std::string& header, const std::string& last, const std::string& added) {
  const std::string include = folder / "include";
  std::filesystem::copy(kSources + "/kernels/include", include, std::filesystem::copy_options::recursive);
  std::string text = text_of(include + "/annulus/kernels/" + header);
  const std::size_t at = text.find(last);
  REQUIRE(at != std::string::npos);
  text.replace(at, last.size(), added);
  std::ofstream(include + "/annulus/kernels/" + header) << text;
}

/// What the compiler says of a source file with those headers and the project's rule for switches; empty if it compiles.
std::string refusal_of(const TemporaryFolder& folder, const std::string& source) {
  std::vector<std::string> command{ANNULUS_COMPILER,
                                   "-std=c++20",
                                   "-fsyntax-only",
                                   "-fopenmp",
                                   "-I",
                                   folder / "include",
                                   "-I",
                                   ANNULUS_GENERATED_HEADERS,
                                   "-I",
                                   kSources + "/lib/include",
                                   "-I",
                                   kSources + "/lib/src"};
  std::istringstream switches(ANNULUS_EXHAUSTIVE_SWITCHES);
  command.insert(command.end(), std::istream_iterator<std::string>(switches), {});
  command.push_back(source);
  const ProcessResult result = run_process(command, 60, {"LC_ALL=C"});
  REQUIRE_FALSE(result.timed_out);
  return result.exit_code == 0 ? "" : result.err;
}

}  // namespace

TEST_CASE("a third mask does not compile where a mask is asked") {
  const TemporaryFolder folder;
  copy_headers(folder, "tasks.hpp", "  causal,  ///<", "  causal, windowed,  ///<");
  for (const char* source : {"kernels/cpu/attend.cpp", "kernels/reference/reference.cpp", "lib/src/plan/cost.cpp",
                             "lib/src/plan/coverage.cpp", "kernels/include/annulus/kernels/visible_keys.hpp"}) {
    INFO(source);
    CHECK_THAT(refusal_of(folder, kSources + "/" + source), contains_text("enumeration value 'windowed' not handled in switch"));
  }
}

TEST_CASE("a fourth dtype does not compile where a dtype is asked") {
  const TemporaryFolder folder;
  copy_headers(folder, "dtype.hpp", "fp16, bf16 }", "fp16, bf16, fp8 }");
  for (const char* source : {"kernels/cpu/tile_ops.hpp", "lib/src/verify/compare.cpp", "lib/src/verify/oracle.cpp"}) {
    INFO(source);
    CHECK_THAT(refusal_of(folder, kSources + "/" + source), contains_text("enumeration value 'fp8' not handled in switch"));
  }
}

TEST_CASE("the headers compile as they are") {
  const TemporaryFolder folder;
  copy_headers(folder, "tasks.hpp", "  causal,  ///<", "  causal,  ///<");
  CHECK(refusal_of(folder, kSources + "/kernels/cpu/attend.cpp").empty());
}
