// SPDX-License-Identifier: Apache-2.0
// Inputs whose values are not all there: HDF5 alone would read zeros. And what is said of files that cannot be opened.
#include <annulus/core/error.hpp>
#include <annulus/io/source.hpp>
#include <annulus_test.hpp>

#include "hdf5_fixture.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <sys/file.h>
#include <unistd.h>
#include <vector>

namespace {

int flock_error = 0;  ///< what every flock() of this program fails with; 0: it works

}  // namespace

/// Stands before the system's, also for HDF5: a file system that has no locks.
extern "C" int flock(int descriptor, int operation) {
  if (flock_error != 0) {
    errno = flock_error;
    return -1;
  }
  struct flock lock{};
  lock.l_type = operation == LOCK_UN || operation == (LOCK_UN | LOCK_NB) ? F_UNLCK : F_RDLCK;
  lock.l_whence = SEEK_SET;
  return fcntl(descriptor, F_OFD_SETLK, &lock);
}

namespace {

using namespace annulus;
using test::contains_text;
using test::FileWriter;
using test::refusal;
using test::TemporaryFolder;

constexpr hsize_t kHeads = 2;
constexpr hsize_t kDim = 3;
const std::vector<std::string> kNames{"q", "k", "v"};

/// Values begin, begin + 1, ... of `rows` rows.
std::vector<float> values(hsize_t rows, float begin) {
  std::vector<float> numbers(rows * kHeads * kDim);
  for (std::size_t i = 0; i < numbers.size(); ++i) { numbers[i] = begin + static_cast<float>(i); }
  return numbers;
}

void write_part(const std::string& path, hsize_t rows, float begin, hid_t type = H5T_IEEE_F32LE) {
  FileWriter file(path);
  const std::vector<float> numbers = values(rows, begin);
  for (const std::string& name : kNames) {
    const bool same = H5Tequal(type, H5T_IEEE_F32LE) > 0;
    file.dataset(name, type, {1, rows, kHeads, kDim}, same ? numbers.data() : nullptr);
  }
}

/// One part of a virtual dataset: rows [first, first + rows) from the first rows of a dataset.
struct Part {
  std::string file;
  std::string dataset;  ///< empty: the name of the whole
  hsize_t first;
  hsize_t rows;
};

void write_virtual(const std::string& path, hsize_t rows, const std::vector<Part>& parts, hsize_t dim = kDim) {
  const std::vector<hsize_t> extents{1, rows, kHeads, dim};
  std::vector<test::VirtualPart> all;
  for (const Part& part : parts) {
    all.push_back(test::rows_of(part.file, extents, part.first, part.rows));
    all.back().dataset = part.dataset;
  }
  test::write_virtual(path, extents, all);
}

/// q, k and v of [1, 8, kHeads, kDim] with the creation properties; writes rows [0, written).
void write_with(const std::string& path, hid_t creation, hsize_t written, hsize_t rows = 8) {
  FileWriter file(path);
  const std::array<hsize_t, 4> extents{1, rows, kHeads, kDim};
  const std::vector<float> numbers = values(rows, 1);
  for (const std::string& name : kNames) {
    const hid_t space = H5Screate_simple(4, extents.data(), nullptr);
    const hid_t dataset = H5Dcreate2(file.get(), name.c_str(), H5T_IEEE_F32LE, space, H5P_DEFAULT, creation, H5P_DEFAULT);
    REQUIRE(dataset >= 0);
    if (written > 0) {
      const std::array<hsize_t, 4> start{0, 0, 0, 0};
      const std::array<hsize_t, 4> count{1, written, kHeads, kDim};
      H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, count.data(), nullptr);
      const hid_t memory = H5Screate_simple(4, count.data(), nullptr);
      REQUIRE(H5Dwrite(dataset, H5T_IEEE_F32LE, memory, space, H5P_DEFAULT, numbers.data()) >= 0);
      H5Sclose(memory);
    }
    H5Dclose(dataset);
    H5Sclose(space);
  }
}

std::vector<float> read_all(const TensorSource& source) {
  std::vector<float> read(static_cast<std::size_t>(source.problem().seq_len) * kHeads * kDim);
  source.read(Tensor::k, 0, 0, source.problem().seq_len, DType::fp32, read.data());
  return read;
}

/// A zlib stream (RFC 1950) of one stored block.
std::string stored_blocks(const std::string& bytes) {
  std::uint32_t a = 1;
  std::uint32_t b = 0;
  for (const char byte : bytes) {
    a = (a + static_cast<unsigned char>(byte)) % 65521;
    b = (b + a) % 65521;
  }
  const auto length = static_cast<std::uint16_t>(bytes.size());
  const auto low = [](unsigned word) { return static_cast<char>(word & 0xffU); };
  std::string stream{'\x78', '\x01', '\x01', low(length), low(length >> 8U), low(~length & 0xffffU), low((~length & 0xffffU) >> 8U)};
  stream += bytes;
  for (const std::uint32_t word : {b >> 8U, b, a >> 8U, a}) { stream += low(word); }
  return stream;
}

int decoded_chunks = 0;

std::size_t count_decoding(unsigned flags, std::size_t /*count*/, const unsigned* /*settings*/, std::size_t bytes,
                           std::size_t* /*capacity*/, void** /*buffer*/) {
  if ((flags & H5Z_FLAG_REVERSE) != 0) { ++decoded_chunks; }
  return bytes;
}

/// Sets an environment variable for as long as it lives.
class Environment {
 public:
  Environment(const char* name, const std::string& value) : name_(name) { ::setenv(name, value.c_str(), 1); }
  ~Environment() { ::unsetenv(name_); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
};

}  // namespace

TEST_CASE("a virtual dataset is read where all its parts are there, and its files are known", "[io][input]") {
  const TemporaryFolder folder;
  write_part(folder.file("a.h5"), 3, 0);
  write_part(folder.file("b.h5"), 5, 18);
  write_virtual(folder.file("inner.h5"), 8, {{"a.h5", "", 0, 3}, {"b.h5", "", 3, 5}});
  write_virtual(folder.file("outer.h5"), 8, {{folder.file("inner.h5"), "", 0, 8}});

  for (const char* name : {"inner.h5", "outer.h5"}) {
    const auto source = open_input(folder.file(name));
    CHECK(read_all(*source) == values(8, 0));
    const std::vector<std::string> files = source->files();
    CHECK(files.front() == folder.file(name));
    for (const char* part : {"a.h5", "b.h5"}) { CHECK(std::find(files.begin(), files.end(), folder.file(part)) != files.end()); }
  }
}

TEST_CASE("rows of a virtual dataset that are read in order decode each chunk of a part once", "[io][input]") {
  const TemporaryFolder folder;
  constexpr hsize_t kPartDim = 64;
  // 2 MiB a chunk, more than HDF5 keeps; parts of one length, and of others that no chunk of another ends with.
  const auto lengths = GENERATE(values<std::vector<hsize_t>>({{8192, 8192}, {3000, 8192, 5000, 700}, {20000, 3000}}));
  const test::RegisteredFilter filter(411, "counts", count_decoding);
  std::vector<Part> parts;
  hsize_t rows = 0;
  int chunks = 0;
  for (const hsize_t own : lengths) {
    const std::string part = "part" + std::to_string(parts.size()) + ".h5";
    const hsize_t chunk = std::min<hsize_t>(own, 8192);
    test::write_filtered(folder.file(part), 411, {1, own, kHeads, kPartDim}, kHeads, {1, chunk, 1, kPartDim});
    parts.push_back({part, "", rows, own});
    rows += own;
    chunks += static_cast<int>((own + chunk - 1) / chunk * kHeads);
  }
  const std::string path = folder.file("whole.h5");
  write_virtual(path, rows, parts, kPartDim);
  const auto source = open_input(path);
  decoded_chunks = 0;
  constexpr std::int64_t kPiece = 1024;
  const auto count = static_cast<std::int64_t>(rows);
  std::vector<float> read(rows * kHeads * kPartDim);
  for (std::int64_t row = 0; row < count; row += kPiece) {
    source->read(Tensor::k, 0, row, std::min(kPiece, count - row), DType::fp32, read.data() + row * std::int64_t{kHeads * kPartDim});
  }
  CHECK(decoded_chunks == chunks);
  const std::size_t last = lengths.back() * kHeads * kPartDim - 1;
  CHECK(read.back() == static_cast<float>(last % 4093) / 64.0F);
}

TEST_CASE("a virtual dataset of which something is missing is refused, naming the file or the place", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("vds.h5");
  const std::string part = folder.file("part.h5");
  write_part(folder.file("a.h5"), 3, 0);
  const auto with = [&](hsize_t rows, const std::vector<Part>& parts) {
    write_virtual(path, rows, parts);
    return refusal(path);
  };
  const std::vector<Part> whole{{"a.h5", "", 0, 3}, {"part.h5", "", 3, 5}};

  CHECK_THAT(with(8, whole), contains_text("part.h5") && contains_text("missing"));
  write_part(part, 5, 0);
  CHECK(with(8, whole) == "accepted");
  write_part(part, 4, 0);
  CHECK_THAT(with(8, whole), contains_text("part.h5") && contains_text("[1, 4, 2, 3]"));
  write_part(part, 5, 0, H5T_IEEE_F64LE);
  CHECK_THAT(with(8, whole), contains_text("part.h5") && contains_text("64-bit float"));
  { const FileWriter empty(part); }
  CHECK_THAT(with(8, whole), contains_text("part.h5") && contains_text("is missing"));
  std::ofstream(part) << "no HDF5";
  CHECK_THAT(with(8, whole), contains_text("part.h5") && contains_text("not an HDF5 file"));
  std::filesystem::remove(part);
  std::filesystem::create_directory(part);
  CHECK_THAT(with(8, whole), contains_text("part.h5") && contains_text("is a folder"));

  CHECK_THAT(with(8, {{"a.h5", "", 0, 3}}), contains_text("/q") && contains_text("from [0, 3, 0, 0] on"));
  CHECK_THAT(with(8, {{"a.h5", "", 0, 3}, {"a.h5", "", 1, 3}, {"a.h5", "", 5, 3}}), contains_text("from [0, 4, 0, 0] on"));
  CHECK_THAT(with(3, {{"vds.h5", "", 0, 3}}), contains_text("deep"));
  CHECK_THAT(with(3, {{".", "", 0, 3}}), contains_text("deep"));
  CHECK_THAT(with(3, {{".", "nothing", 0, 3}}), contains_text("nothing") && contains_text("is missing"));
  CHECK_THAT(with(3, {{"a%%.h5", "", 0, 3}}), contains_text("a%%.h5"));
}

TEST_CASE("a part of a virtual dataset that was never written or lacks its filter is refused like a dataset", "[io][input]") {
  const TemporaryFolder folder;
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const std::array<hsize_t, 4> chunk{1, 2, kHeads, kDim};
  H5Pset_chunk(creation, 4, chunk.data());
  write_with(folder.file("a.h5"), creation, 5);
  write_virtual(folder.file("vds.h5"), 8, {{"a.h5", "", 0, 8}});
  H5Pclose(creation);

  CHECK_THAT(refusal(folder.file("vds.h5")), contains_text("a.h5") && contains_text("chunk at [0, 6, 0, 0] was never written"));
}

TEST_CASE("chunks and datasets that were never written are refused, whatever indexes them", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("chunks.h5");
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const auto chunked = [&](const std::array<hsize_t, 4>& chunk) { REQUIRE(H5Pset_chunk(creation, 4, chunk.data()) >= 0); };

  write_with(path, creation, 0);
  CHECK_THAT(refusal(path), contains_text("/q was created but never written"));
  write_with(path, creation, 8);
  CHECK(refusal(path) == "accepted");
  chunked({1, 3, 1, 2});
  write_with(path, creation, 0);
  CHECK_THAT(refusal(path), contains_text("/q: its chunk at [0, 0, 0, 0] was never written"));
  write_with(path, creation, 6);
  CHECK_THAT(refusal(path), contains_text("/q: its chunk at [0, 6, 0, 0] was never written"));
  write_with(path, creation, 7);  // the last chunk is there, its last row is not: the fill value is then in the file
  CHECK(refusal(path) == "accepted");
  H5Pset_deflate(creation, 1);
  write_with(path, creation, 6);
  CHECK_THAT(refusal(path), contains_text("chunk at [0, 6, 0, 0]"));
  write_with(path, creation, 8);
  CHECK(refusal(path) == "accepted");
  CHECK(read_all(*open_input(path)) == values(8, 1));
  H5Pclose(creation);
}

TEST_CASE("chunks that are larger than their dataset can ever be are refused", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("large-chunks.h5");
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const std::array<hsize_t, 4> chunk{1, 3, 1, 2};
  REQUIRE(H5Pset_chunk(creation, 4, chunk.data()) >= 0);
  H5Pset_deflate(creation, 1);
  write_with(path, creation, 8);
  H5Pclose(creation);
  REQUIRE(refusal(path) == "accepted");
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  // The extents of a chunk as a header has them, the size of an element last.
  const std::string stored("\1\0\0\0\3\0\0\0\1\0\0\0\2\0\0\0\4\0\0\0", 20);
  const std::size_t place = bytes.find(stored);
  REQUIRE(place != std::string::npos);
  bytes[place + 5] = '\1';  // 259 rows

  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;

  CHECK_THAT(refusal(path), contains_text("is damaged: its chunks are [1, 259, 1, 2], and it can never be larger than [1, 8, 2, 3]"));
}

TEST_CASE("a chunk that decodes to another length than a chunk is refused, whatever its dataset may grow to", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("short-chunk.h5");
  constexpr hsize_t kRows = 8;
  const std::vector<float> numbers = values(kRows, 1);
  // Half a chunk, and one and a half, as no filter gives them; the last chunk lies partly outside the dataset.
  const auto [bytes, corner, skipped] = GENERATE(
      table<std::size_t, hsize_t, std::uint32_t>({{36, 0, 0}, {36, 6, 0}, {108, 3, 0}, {36, 3, 1}, {0, 3, 1}, {72, 0, 0}, {72, 3, 1}}));
  const hsize_t most = GENERATE(H5S_UNLIMITED, hsize_t{8});
  CAPTURE(bytes, corner, skipped, most);
  {
    FileWriter file(path);
    const std::array<hsize_t, 4> extents{1, kRows, kHeads, kDim};
    const std::array<hsize_t, 4> largest{1, most, kHeads, kDim};
    const std::array<hsize_t, 4> chunk{1, 3, kHeads, kDim};
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    REQUIRE(H5Pset_chunk(creation, 4, chunk.data()) >= 0);
    REQUIRE(H5Pset_deflate(creation, 1) >= 0);
    const hid_t space = H5Screate_simple(4, extents.data(), largest.data());
    for (const std::string& name : kNames) {
      const hid_t dataset = H5Dcreate2(file.get(), name.c_str(), H5T_IEEE_F32LE, space, H5P_DEFAULT, creation, H5P_DEFAULT);
      REQUIRE(dataset >= 0);
      REQUIRE(H5Dwrite(dataset, H5T_IEEE_F32LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, numbers.data()) >= 0);
      if (name == "k") {
        const std::string decoded(std::max<std::size_t>(bytes, 1), '\0');
        const std::string stored = skipped != 0 ? decoded : stored_blocks(decoded);
        const std::array<hsize_t, 4> place{0, corner, 0, 0};
        REQUIRE(H5Dwrite_chunk(dataset, H5P_DEFAULT, skipped, place.data(), stored.size(), stored.data()) >= 0);
      }
      H5Dclose(dataset);
    }
    H5Sclose(space);
    H5Pclose(creation);
  }
  const auto source = open_input(path);
  if (bytes == 72) {
    CHECK(read_all(*source).size() == numbers.size());
    CHECK_NOTHROW(source->fingerprint(Tensor::k, 0, 1));
    return;
  }
  const std::string message = fmt::format("'{}': /k is damaged: its chunk at [0, {}, 0, 0] decodes to {} bytes, and a chunk is 72", path,
                                          corner, std::max<std::size_t>(bytes, 1));
  CHECK_THROWS_WITH(read_all(*source), contains_text(message));
  CHECK_THROWS_WITH(source->fingerprint(Tensor::k, 0, 1), contains_text(message));
}

TEST_CASE("a chunk without filters that is not as long as a chunk is refused", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("short-plain-chunk.h5");
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const std::array<hsize_t, 4> chunk{1, 3, kHeads, kDim};
  REQUIRE(H5Pset_chunk(creation, 4, chunk.data()) >= 0);
  write_with(path, creation, 8);
  H5Pclose(creation);
  REQUIRE(refusal(path) == "accepted");
  std::ifstream file(path, std::ios::binary);
  const std::string whole{std::istreambuf_iterator<char>(file), {}};
  // The second entry of a dataset's index (a B-tree of version 1): the chunk's bytes, its filters, and its corner.
  std::string entry("\110\0\0\0\0\0\0\0", 8);
  for (const char at : {'\0', '\3', '\0', '\0', '\0'}) { entry += std::string(1, at).append(7, '\0'); }
  const std::size_t place = whole.find(entry);
  REQUIRE(place != std::string::npos);
  const int bytes = GENERATE(0, 1, 71, 73);
  std::string damaged = whole;
  damaged[place] = static_cast<char>(bytes);

  std::ofstream(path, std::ios::binary | std::ios::trunc) << damaged;

  const std::string message = fmt::format("/q is damaged: 3 chunks of 72 bytes should be stored, and {} bytes are", 2 * 72 + bytes);
  CHECK_THAT(refusal(path), contains_text(message));
}

TEST_CASE("external storage that is missing or too short is refused with the numbers", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("external.h5");
  const std::string raw = folder.file("raw.bin");
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const auto bytes = static_cast<hsize_t>(8 * kHeads * kDim * sizeof(float));
  REQUIRE(H5Pset_external(creation, raw.c_str(), 16, bytes / 2) >= 0);
  REQUIRE(H5Pset_external(creation, raw.c_str(), 16, H5F_UNLIMITED) >= 0);
  write_with(path, creation, 0);
  H5Pclose(creation);

  CHECK_THAT(refusal(path), contains_text("raw.bin") && contains_text("missing"));
  std::ofstream(raw) << "x";
  CHECK_THAT(refusal(path), contains_text("raw.bin' is too short") && contains_text("has 1"));
  std::filesystem::resize_file(raw, 16 + bytes / 2 - 1);
  CHECK_THAT(refusal(path), contains_text("too short"));
  std::filesystem::resize_file(raw, 16 + bytes / 2);
  CHECK(refusal(path) == "accepted");
  const std::vector<std::string> files = open_input(path)->files();
  CHECK(std::find(files.begin(), files.end(), raw) != files.end());
}

TEST_CASE("datasets behind external links are read, and what is missing behind them is named", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("links.h5");
  {
    const FileWriter file(path);
    for (const std::string& name : kNames) {
      H5Lcreate_external("target.h5", name.c_str(), file.get(), name.c_str(), H5P_DEFAULT, H5P_DEFAULT);
    }
  }
  CHECK_THAT(refusal(path), contains_text("/q") && contains_text("'target.h5', which is missing"));
  write_part(folder.file("target.h5"), 4, 7);
  const auto source = open_input(path);
  CHECK(read_all(*source) == values(4, 7));
  CHECK(source->files() == std::vector<std::string>{path, folder.file("target.h5")});
  {
    const FileWriter file(folder.file("target.h5.new"));
    for (const std::string& name : kNames) {
      H5Lcreate_external("links.h5", name.c_str(), file.get(), name.c_str(), H5P_DEFAULT, H5P_DEFAULT);
    }
  }
  std::filesystem::rename(folder.file("target.h5.new"), folder.file("target.h5"));
  CHECK_THAT(refusal(path), contains_text("external links"));
}

TEST_CASE("a filter that this HDF5 lacks is refused by name, before anything is read", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("filtered.h5");
  constexpr H5Z_filter_t kFilter = 300;
  const H5Z_class2_t kind{H5Z_CLASS_T_VERS,
                          kFilter,
                          1,
                          1,
                          "annulus test filter",
                          nullptr,
                          nullptr,
                          [](unsigned, std::size_t, const unsigned*, std::size_t bytes, std::size_t*, void**) { return bytes; }};
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const std::array<hsize_t, 4> chunk{1, 2, kHeads, kDim};
  H5Pset_chunk(creation, 4, chunk.data());
  REQUIRE(H5Zregister(&kind) >= 0);
  REQUIRE(H5Pset_filter(creation, kFilter, H5Z_FLAG_MANDATORY, 0, nullptr) >= 0);
  write_with(path, creation, 8);
  H5Pclose(creation);
  CHECK(refusal(path) == "accepted");
  REQUIRE(H5Zunregister(kFilter) >= 0);

  CHECK_THAT(refusal(path), contains_text("/q is compressed by filter 300 (annulus test filter)") && contains_text("HDF5_PLUGIN_PATH"));
}

TEST_CASE("where a file system has no locks, files and all their parts are read without one", "[io][input]") {
  const TemporaryFolder folder;
  write_part(folder.file("a.h5"), 3, 0);
  write_part(folder.file("b.h5"), 5, 18);
  write_virtual(folder.file("vds.h5"), 8, {{"a.h5", "", 0, 3}, {"b.h5", "", 3, 5}});
  {
    const FileWriter file(folder.file("link.h5"));
    for (const std::string& name : kNames) { H5Lcreate_external("a.h5", name.c_str(), file.get(), name.c_str(), H5P_DEFAULT, H5P_DEFAULT); }
  }
  for (const int error : {ENOLCK, EOPNOTSUPP, 524, ENOSYS}) {
    INFO("error " << error);
    flock_error = error;
    CHECK(read_all(*open_input(folder.file("vds.h5"))) == values(8, 0));
    CHECK(read_all(*open_input(folder.file("link.h5"))) == values(3, 0));
    flock_error = 0;
  }
}

TEST_CASE("a lock that is held, and one that the environment insists on, are called that and not damage", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.h5");
  write_part(path, 3, 0);

  flock_error = EWOULDBLOCK;
  CHECK_THAT(refusal(path), contains_text("is locked by a process") && contains_text("HDF5_USE_FILE_LOCKING=FALSE"));
  {
    const Environment off("HDF5_USE_FILE_LOCKING", "FALSE");
    CHECK_THAT(refusal(path), !contains_text("damaged"));
  }
  flock_error = ENOLCK;
  for (const char* wish : {"TRUE", "1", "BEST_EFFORT"}) {
    const Environment on("HDF5_USE_FILE_LOCKING", wish);
    CHECK_THAT(refusal(path), contains_text("cannot be locked: No locks available") && contains_text("HDF5_USE_FILE_LOCKING=FALSE"));
  }
  flock_error = 0;
  CHECK(refusal(path) == "accepted");
}

TEST_CASE("a file of a newer format, one that its writer left open and a damaged one are told apart", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.h5");
  const auto with_byte = [&](std::streamoff place, char byte) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(place);
    file.put(byte);
  };

  write_part(path, 3, 0);
  with_byte(8, 9);  // the version of the superblock
  CHECK_THAT(refusal(path), contains_text("newer format than HDF5 " + std::to_string(H5_VERS_MAJOR)) && !contains_text("damaged"));
  write_part(path, 3, 0);
  with_byte(13, 7);  // the size of an address
  CHECK_THAT(refusal(path), contains_text("is damaged") && !contains_text("newer"));

  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_libver_bounds(access, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST);
  const hid_t writing = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
  REQUIRE(writing >= 0);
  H5Fflush(writing, H5F_SCOPE_GLOBAL);
  std::filesystem::copy_file(path, folder.file("left.h5"));
  H5Fclose(writing);
  H5Pclose(access);
  CHECK_THAT(refusal(folder.file("left.h5")), contains_text("marked as open for writing") && !contains_text("damaged"));
}
