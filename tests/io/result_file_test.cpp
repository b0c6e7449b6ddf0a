// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/result_file.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include "child.hpp"
#include "hdf5_fixture.hpp"
#include "text_file.hpp"

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

using namespace annulus;
using test::contains_text;
using test::in_child;
using test::RawDataset;
using test::read_text;
using test::TemporaryFolder;

Problem make_problem(DType dtype, std::int64_t seq_len = 13) {
  Problem problem;
  problem.batch = 2;
  problem.seq_len = seq_len;
  problem.heads = 3;
  problem.kv_heads = 1;
  problem.head_dim = 5;
  problem.dtype = dtype;
  return problem;
}

/// Distinct bytes for /o and distinct values for /lse.
struct Contents {
  explicit Contents(const Problem& problem)
      : output(static_cast<std::size_t>(problem.batch * problem.seq_len * problem.heads * problem.head_dim * size_of(problem.dtype))),
        lse(static_cast<std::size_t>(problem.batch * problem.heads * problem.seq_len)) {
    for (std::size_t i = 0; i < output.size(); ++i) { output[i] = static_cast<std::uint8_t>(i * 37 + i / 256); }
    for (std::size_t i = 0; i < lse.size(); ++i) { lse[i] = static_cast<float>(i) + 0.5F; }
  }
  std::vector<std::uint8_t> output;  ///< [batch, seq, heads, head_dim]
  std::vector<float> lse;            ///< [batch, head, seq]
};

/// Writes rows in pieces of 1, 2, 3, ... rows, the last first.
void write_all(ResultFile& file, const Problem& problem, const Contents& contents) {
  const std::int64_t row_bytes = problem.heads * problem.head_dim * size_of(problem.dtype);
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    std::int64_t count = 1;
    for (std::int64_t end = problem.seq_len; end > 0;) {
      const std::int64_t first = std::max<std::int64_t>(0, end - count++);
      file.write_output({batch, first, end - first, 0, problem.heads},
                        contents.output.data() + (batch * problem.seq_len + first) * row_bytes);
      std::vector<float> lse;
      for (std::int64_t head = 0; head < problem.heads; ++head) {
        const float* row = contents.lse.data() + (batch * problem.heads + head) * problem.seq_len;
        lse.insert(lse.end(), row + first, row + end);
      }
      file.write_lse({batch, first, end - first, 0, problem.heads}, lse.data());
      end = first;
    }
  }
}

}  // namespace

TEST_CASE("a committed result file holds what was written, in its own dtype and contiguous", "[io][result]") {
  const TemporaryFolder folder;
  for (const DType dtype : {DType::fp32, DType::fp16, DType::bf16}) {
    INFO(to_string(dtype));
    const Problem problem = make_problem(dtype);
    const Contents contents(problem);
    const std::string path = folder.file(std::string(to_string(dtype)) + ".h5");
    {
      ResultFile file(path, false, problem);
      write_all(file, problem, contents);
      CHECK_FALSE(std::filesystem::exists(path));
      file.commit();
    }
    const RawDataset output(path, "/o");
    const RawDataset lse(path, "/lse");

    CHECK(output.extents == std::vector<hsize_t>{2, 13, 3, 5});
    CHECK(test::is_float_type(output.type, dtype == DType::fp32 ? 4 : 2, dtype == DType::fp16 ? 5 : 8,
                              dtype == DType::fp32   ? 23
                              : dtype == DType::fp16 ? 10
                                                     : 7));
    CHECK(output.bytes == contents.output);
    CHECK(lse.extents == std::vector<hsize_t>{2, 3, 13});
    CHECK(test::is_float_type(lse.type, 4, 8, 23));
    CHECK(std::equal(contents.lse.begin(), contents.lse.end(), lse.as<float>()));
    CHECK((output.contiguous && lse.contiguous));
  }
  CHECK(folder.names().size() == 3);
}

TEST_CASE("columns are tables of their extents and kind, and provenance is strings", "[io][result]") {
  const TemporaryFolder folder;
  const Problem problem = make_problem(DType::fp32);
  const std::string path = folder.file("result.h5");
  const std::string config(100000, 'x');  // larger than an HDF5 attribute could be
  {
    ResultFile file(path, false, problem);
    write_all(file, problem, Contents(problem));
    file.write_columns("/timings", std::array<std::int64_t, 2>{2, 2},
                       std::vector<NamedColumn>{{"compute_ms", std::vector<double>{1, 0, 6, 11}},
                                                {"bytes_sent", std::vector<std::int64_t>{std::int64_t{1} << 40, 0, 9, 14}}});
    file.write_columns("/names", std::array<std::int64_t, 1>{2}, std::vector<NamedColumn>{{"host", std::vector<std::string>{"a", "bcd"}}});
    CHECK_THROWS_WITH(file.write_columns("/short", std::array<std::int64_t, 2>{2, 2},
                                         std::vector<NamedColumn>{{"compute_ms", std::vector<double>{1, 2, 3}}}),
                      contains_text("column compute_ms has 3 values for extents 2 x 2"));
    file.write_provenance({{"config", config},
                           {"empty", ""},
                           {"hosts",
                            "n\xC3\xB6"
                            "de1"}});
    file.write_provenance({{"environment/OMP_NUM_THREADS", "4"}});
    file.commit();
  }
  const RawDataset compute(path, "/timings/compute_ms");
  const RawDataset sent(path, "/timings/bytes_sent");
  const RawDataset hosts(path, "/names/host");

  CHECK(compute.extents == std::vector<hsize_t>{2, 2});
  CHECK(H5Tequal(compute.type, H5T_IEEE_F64LE) > 0);
  CHECK(std::vector<double>(compute.as<double>(), compute.as<double>() + 4) == std::vector<double>{1, 0, 6, 11});
  CHECK(H5Tequal(sent.type, H5T_STD_I64LE) > 0);
  CHECK(std::vector<std::int64_t>(sent.as<std::int64_t>(), sent.as<std::int64_t>() + 4) ==
        std::vector<std::int64_t>{std::int64_t{1} << 40, 0, 9, 14});
  CHECK(hosts.extents == std::vector<hsize_t>{2});
  CHECK(std::string(hosts.as<char>() + H5Tget_size(hosts.type)) == "bcd");
  const RawDataset stored(path, "/provenance/config");
  CHECK(stored.extents.empty());
  CHECK(H5Tget_cset(stored.type) == H5T_CSET_UTF8);
  CHECK(std::string(stored.as<char>()) == config);
  CHECK(std::string(RawDataset(path, "/provenance/empty").as<char>()).empty());
  CHECK(std::string(RawDataset(path, "/provenance/hosts").as<char>()) ==
        "n\xC3\xB6"
        "de1");
  CHECK(std::string(RawDataset(path, "/provenance/environment/OMP_NUM_THREADS").as<char>()) == "4");
}

TEST_CASE("a result file that is not committed leaves nothing", "[io][result]") {
  const TemporaryFolder folder;
  const Problem problem = make_problem(DType::bf16);
  {
    ResultFile file(folder.file("result.h5"), false, problem);
    write_all(file, problem, Contents(problem));
    CHECK_FALSE(std::filesystem::exists(folder.file("result.h5")));
  }
  CHECK(folder.names().empty());

  const auto fail_half_way = [&] {
    ResultFile file(folder.file("result.h5"), false, problem);
    file.write_output({0, 0, 1, 0, problem.heads}, Contents(problem).output.data());
    throw std::runtime_error("injected");
  };
  CHECK_THROWS_WITH(fail_half_way(), "injected");
  CHECK(folder.names().empty());
}

TEST_CASE("a result with rows missing cannot be committed", "[io][result]") {
  const TemporaryFolder folder;
  const Problem problem = make_problem(DType::fp32);
  const Contents contents(problem);
  {
    ResultFile file(folder.file("result.h5"), false, problem);
    file.write_output({0, 0, 13, 0, problem.heads}, contents.output.data());
    file.write_output({1, 0, 12, 0, problem.heads}, contents.output.data());

    CHECK_THROWS_WITH(file.commit(), contains_text("incomplete") && contains_text("75 heads of rows of /o") && contains_text("not 78"));
    CHECK_THROWS_AS(file.write_output({0, 10, 4, 0, problem.heads}, contents.output.data()), InvalidArgument);
    CHECK_THROWS_AS(file.write_output({0, 0, 1, 1, problem.heads}, contents.output.data()), InvalidArgument);
    CHECK_THROWS_AS(file.write_lse({2, 0, 1, 0, problem.heads}, contents.lse.data()), InvalidArgument);
  }
  CHECK(folder.names().empty());
}

TEST_CASE("a killed process leaves no file of the target's name and an old one intact", "[io][result]") {
  const TemporaryFolder folder;
  const Problem problem = make_problem(DType::fp16);
  for (const bool existing : {false, true}) {
    const std::string path = folder.file(existing ? "old.h5" : "new.h5");
    if (existing) { std::ofstream(path) << "old result"; }
    const int status = in_child([&] {
      ResultFile file(path, true, problem);
      write_all(file, problem, Contents(problem));
      ::kill(::getpid(), SIGKILL);
    });

    CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
    CHECK(std::filesystem::exists(path) == existing);
    if (existing) { CHECK(read_text(path) == "old result"); }
  }
}

TEST_CASE("an existing file is refused without force and replaced only by commit", "[io][result]") {
  const TemporaryFolder folder;
  const Problem problem = make_problem(DType::fp32);
  const std::string path = folder.file("result.h5");
  std::ofstream(path) << "old result";

  CHECK_THROWS_MATCHES(check_result_path(path, false), InvalidArgument,
                       Catch::Matchers::Message("result file '" + path + "' exists; --force replaces it"));
  CHECK_THROWS_AS(ResultFile(path, false, problem), InvalidArgument);
  CHECK_NOTHROW(check_result_path(path, true));
  { const ResultFile abandoned(path, true, problem); }
  CHECK(read_text(path) == "old result");
  CHECK(folder.names().size() == 1);
  ResultFile file(path, true, problem);
  write_all(file, problem, Contents(problem));
  CHECK(read_text(path) == "old result");
  file.commit();
  CHECK(RawDataset(path, "/o").bytes == Contents(problem).output);
  CHECK(folder.names().size() == 1);
}

TEST_CASE("a file that appears meanwhile is not overwritten without force, and the complete result is kept beside it", "[io][result]") {
  const TemporaryFolder folder;
  const Problem problem = make_problem(DType::fp32);
  const std::string path = folder.file("result.h5");
  {
    ResultFile file(path, false, problem);
    write_all(file, problem, Contents(problem));
    std::ofstream(path) << "somebody else's";

    CHECK_THROWS_WITH(file.commit(), contains_text("created by another program") && contains_text("is kept as '"));
  }
  CHECK(read_text(path) == "somebody else's");
  REQUIRE(folder.names().size() == 2);
  const std::string kept = folder.names()[folder.names()[0] == "result.h5" ? 1 : 0];
  CHECK(RawDataset(folder.file(kept), "/o").bytes == Contents(problem).output);
}

TEST_CASE("a symbolic link is followed to the file it names", "[io][result]") {
  const TemporaryFolder folder;
  const Problem problem = make_problem(DType::fp32);
  std::ofstream(folder.file("target.h5")) << "old result";
  std::filesystem::create_symlink("target.h5", folder.file("link.h5"));
  std::filesystem::create_symlink("nowhere.h5", folder.file("dangling.h5"));

  CHECK_THROWS_WITH(check_result_path(folder.file("link.h5"), false), contains_text("exists"));
  CHECK_THROWS_WITH(check_result_path(folder.file("dangling.h5"), true), contains_text("leads nowhere"));
  ResultFile file(folder.file("link.h5"), true, problem);
  write_all(file, problem, Contents(problem));
  file.commit();
  CHECK(std::filesystem::is_symlink(folder.file("link.h5")));
  CHECK(RawDataset(folder.file("target.h5"), "/o").bytes == Contents(problem).output);
}

TEST_CASE("paths that cannot take a result are refused with the reason", "[io][result]") {
  const TemporaryFolder folder;
  std::ofstream(folder.file("plain")) << "";
  const auto refusal = [](const std::string& path) -> std::string {
    try {
      check_result_path(path, true);
    } catch (const InvalidArgument& error) { return error.what(); }
    return "accepted";
  };

  CHECK_THAT(refusal(""), contains_text("empty"));
  CHECK_THAT(refusal(folder.file("new") + "/"), contains_text("names a folder"));
  CHECK_THAT(refusal(folder.file(".")), contains_text("is a folder"));
  CHECK_THAT(refusal(folder.file("absent/result.h5")), contains_text("No such file"));
  CHECK_THAT(refusal(folder.file("plain/result.h5")), contains_text("Not a directory"));
  CHECK_THAT(refusal("/dev/full"), contains_text("device"));
  CHECK_THAT(refusal(folder.file(std::string(300, 'n'))), contains_text("name too long"));
  CHECK(refusal(folder.file(std::string(250, 'n'))) == "accepted");
  CHECK_NOTHROW(ResultFile(folder.file(std::string(250, 'n')), false, make_problem(DType::fp32)));
  CHECK(folder.names().size() == 1);

  std::filesystem::create_directory(folder.file("closed"));
  std::filesystem::permissions(folder.file("closed"), std::filesystem::perms(0555));
  // root may write anywhere: the child gives that up.
  const int status = in_child([&] {
    std::filesystem::permissions(std::filesystem::path(folder.file("closed")).parent_path(), std::filesystem::perms(0755));
    if (::getuid() == 0 && ::setuid(65534) != 0) { ::_exit(98); }
    ::_exit(refusal(folder.file("closed/result.h5")).find("cannot be written: Permission denied") != std::string::npos ? 0 : 1);
  });
  CHECK(status == 0);
}

TEST_CASE("a file that is too large for its place is refused before anything is written", "[io][result]") {
  const TemporaryFolder folder;
  const Problem problem = make_problem(DType::fp32, 40000);  // 4.8 MB of /o
  const Contents contents(problem);
  const std::string path = folder.file("result.h5");
  // A limit on the size of files acts like a full disk, and needs no mount. It is the child's own.
  for (const rlim_t limit : {rlim_t{100}, rlim_t{1500}, rlim_t{3000000}, rlim_t{4900000}, rlim_t{5770000}}) {
    INFO("limit " << limit);
    const int status = in_child([&] {
      std::signal(SIGXFSZ, SIG_IGN);
      const rlimit bytes{limit, limit};
      if (::setrlimit(RLIMIT_FSIZE, &bytes) != 0) { ::_exit(98); }
      try {
        ResultFile file(path, false, problem);
        file.write_output({0, 0, 40000, 0, problem.heads}, contents.output.data());
        file.write_output({1, 0, 40000, 0, problem.heads}, contents.output.data());
        file.write_lse({0, 0, 40000, 0, problem.heads}, contents.lse.data());
        file.write_lse({1, 0, 40000, 0, problem.heads}, contents.lse.data());
        file.commit();
      } catch (const InvalidArgument& error) {  // known before anything is written
        const std::string message = error.what();
        // Through the exit handlers, where HDF5 would crash on a file that it could not close.
        std::exit(message.find(path) != std::string::npos && message.find("File too large") != std::string::npos ? 0 : 1);
      }
      ::_exit(2);
    });

    CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
    CHECK(folder.names().empty());
  }
}
