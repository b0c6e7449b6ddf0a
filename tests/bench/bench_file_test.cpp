// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/bench_file.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include "io/hdf5_fixture.hpp"

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

using namespace annulus;
using test::contains_text;
using test::RawDataset;
using test::TemporaryFolder;

/// Two rows: one rank with one step, and two ranks with unlike numbers of steps.
const std::vector<BenchDetail> kDetails{
    {{1.5, 2.5, 3.5}, {{{4.0, 0.0, 0.0, 0, 0}}}},
    {{7.0, 8.0, 9.0}, {{{1.0, 2.0, 3.0, 40, 50}}, {{6.0, 7.0, 8.0, 90, 100}, {2.0, 3.0, 4.0, 5, 6}}}},
};
const std::vector<NamedColumn> kColumns{
    {"seq-len", std::vector<std::int64_t>{64, std::int64_t{1} << 40}},
    {"median_ms", std::vector<double>{2.5, 8.0}},
    {"dtype", std::vector<std::string>{"bf16", "b\xC3\xBC"}},
};

template <class Element>
std::vector<Element> elements(const RawDataset& dataset) {
  const auto count = dataset.bytes.size() / sizeof(Element);
  return {dataset.as<Element>(), dataset.as<Element>() + count};
}

TEST_CASE("a bench file holds a dataset for each column, all samples, and the steps of every row") {
  const TemporaryFolder folder;
  const std::string path = folder.file("bench.h5");
  BenchFile(path, false).write(kColumns, kDetails, {{"config", "heads = 2\n"}});

  const RawDataset lengths(path, "/rows/seq-len");
  CHECK(lengths.extents == std::vector<hsize_t>{2});
  CHECK(H5Tequal(lengths.type, H5T_STD_I64LE) > 0);
  CHECK(elements<std::int64_t>(lengths) == std::vector<std::int64_t>{64, std::int64_t{1} << 40});
  const RawDataset medians(path, "/rows/median_ms");
  CHECK(H5Tequal(medians.type, H5T_IEEE_F64LE) > 0);
  CHECK(elements<double>(medians) == std::vector<double>{2.5, 8.0});
  const RawDataset dtypes(path, "/rows/dtype");
  CHECK(dtypes.extents == std::vector<hsize_t>{2});
  CHECK(H5Tget_cset(dtypes.type) == H5T_CSET_UTF8);
  const std::size_t width = H5Tget_size(dtypes.type);
  CHECK(std::string(dtypes.as<char>()) == "bf16");
  CHECK(std::string(dtypes.as<char>() + width) == "b\xC3\xBC");
  const RawDataset samples(path, "/samples_ms");
  CHECK(samples.extents == std::vector<hsize_t>{2, 3});
  CHECK(elements<double>(samples) == std::vector<double>{1.5, 2.5, 3.5, 7, 8, 9});
  CHECK(RawDataset(path, "/timings/0/compute_ms").extents == std::vector<hsize_t>{1, 1});
  const RawDataset exposed(path, "/timings/1/exposed_ms");
  CHECK(exposed.extents == std::vector<hsize_t>{2, 2});
  CHECK(elements<double>(exposed) == std::vector<double>{3, 0, 8, 4});
  CHECK(elements<std::int64_t>(RawDataset(path, "/timings/1/bytes_received")) == std::vector<std::int64_t>{50, 0, 100, 6});
  CHECK(elements<double>(RawDataset(path, "/steps/1/skew_ms")) == std::vector<double>{5, 2});
  CHECK(elements<double>(RawDataset(path, "/steps/1/exposed_ms")) == std::vector<double>{8, 4});
  CHECK(std::string(RawDataset(path, "/provenance/config").as<char>()) == "heads = 2\n");
  CHECK(folder.names().size() == 1);
}

TEST_CASE("what a bench file holds is read back as it was given") {
  const TemporaryFolder folder;
  const std::string path = folder.file("bench.h5");
  const std::string again = folder.file("again.h5");
  BenchFile(path, false).write(kColumns, kDetails, {{"config", "heads = 2\n"}, {"empty", ""}});

  const BenchContents contents = read_bench_file(path);
  BenchFile(again, false).write(contents.columns, contents.details, contents.provenance);

  REQUIRE(contents.rows() == 2);
  CHECK(contents.column("seq-len")->values == kColumns[0].values);
  CHECK(contents.column("median_ms")->values == kColumns[1].values);
  CHECK(contents.column("dtype")->values == kColumns[2].values);
  CHECK(contents.column("heads") == nullptr);
  CHECK(*contents.text("config") == "heads = 2\n");
  CHECK(contents.text("empty")->empty());
  CHECK(contents.text("git") == nullptr);
  CHECK(contents.details[1].samples_ms == kDetails[1].samples_ms);
  CHECK(contents.details[1].timings[1][1].bytes_received == 6);
  for (const std::string name : {"/timings/0/compute_ms", "/timings/1/bytes_sent", "/timings/1/transfer_end_ms", "/steps/1/skew_ms",
                                 "/samples_ms", "/rows/dtype", "/provenance/config"}) {
    INFO(name);
    CHECK(RawDataset(path, name).extents == RawDataset(again, name).extents);
    CHECK(RawDataset(path, name).bytes == RawDataset(again, name).bytes);
  }
}

TEST_CASE("a file that is no table of bench is refused by name") {
  const TemporaryFolder folder;
  const std::string path = folder.file("bench.h5");
  const auto refused = [&] {
    try {
      read_bench_file(path);
    } catch (const InvalidArgument& error) { return std::string(error.what()); }
    return std::string();
  };

  CHECK_THAT(refused(), contains_text("result file '" + path + "'"));
  std::ofstream(path) << "no HDF5";
  CHECK_THAT(refused(), contains_text("result file '" + path + "'"));
  H5Fclose(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT));
  CHECK_THAT(refused(), contains_text("result file '" + path + "' has no /samples_ms"));
}

TEST_CASE("a bench file is complete or absent, and replaces another only by force") {
  const TemporaryFolder folder;
  const std::string path = folder.file("bench.h5");
  const std::vector<NamedColumn> short_column{{"seq-len", std::vector<std::int64_t>{64}}};
  CHECK_THROWS_WITH(BenchFile(path, false).write(short_column, kDetails, {}), contains_text("seq-len has 1 values for extents 2"));
  CHECK(folder.names().empty());

  BenchFile(path, false).write(kColumns, kDetails, {});
  CHECK_THROWS_WITH(BenchFile(path, false), contains_text("--force replaces it"));
  BenchFile(path, true).write({}, {}, {});
  CHECK(RawDataset(path, "/samples_ms").extents == std::vector<hsize_t>{0, 0});
  CHECK(folder.names().size() == 1);
}

TEST_CASE("a bench file grows with its rows") {
  const TemporaryFolder folder;
  const std::string path = folder.file("bench.h5");
  BenchFile file(path, false);
  CHECK_FALSE(std::filesystem::exists(path));
  file.write({}, std::vector<BenchDetail>(kDetails.begin(), kDetails.begin() + 1), {});
  CHECK(RawDataset(path, "/samples_ms").extents == std::vector<hsize_t>{1, 3});
  file.write(kColumns, kDetails, {});
  CHECK(RawDataset(path, "/samples_ms").extents == std::vector<hsize_t>{2, 3});
  CHECK(folder.names().size() == 1);
}

}  // namespace
