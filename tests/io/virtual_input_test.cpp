// SPDX-License-Identifier: Apache-2.0
// Virtual datasets, whose parts are read by our own reader: what HDF5 reads of sound files must come out, and what it does not notice must
// be refused.
#include <annulus/core/error.hpp>
#include <annulus/io/source.hpp>
#include <annulus_test.hpp>

#include "hdf5_fixture.hpp"
#include "io/chunk_grid.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <sys/resource.h>
#include <utility>
#include <vector>

namespace {

using namespace annulus;
using test::contains_text;
using test::FileWriter;
using test::refusal;
using test::rows_of;
using test::space_of;
using test::TemporaryFolder;
using test::write_virtual;
using Part = test::VirtualPart;

const std::vector<std::string> kNames{"q", "k", "v"};

/// A dataset of random fp32 values. An empty chunk: contiguous.
void write_random(hid_t file, const std::string& name, const std::vector<hsize_t>& extents, const std::vector<hsize_t>& chunk,
                  bool filtered, hid_t type, std::mt19937& random) {
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  if (!chunk.empty()) { REQUIRE(H5Pset_chunk(creation, static_cast<int>(chunk.size()), chunk.data()) >= 0); }
  if (!chunk.empty() && filtered) {
    REQUIRE(H5Pset_shuffle(creation) >= 0);
    REQUIRE(H5Pset_deflate(creation, 1) >= 0);
  }
  const hid_t space = space_of(extents);
  const hid_t dataset = H5Dcreate2(file, name.c_str(), type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  REQUIRE(dataset >= 0);
  std::vector<float> values(static_cast<std::size_t>(H5Sget_simple_extent_npoints(space)));
  for (float& value : values) { value = static_cast<float>(random() % 65536); }
  REQUIRE(H5Dwrite(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) >= 0);
  H5Dclose(dataset);
  H5Sclose(space);
  H5Pclose(creation);
}

/// Everything that HDF5 alone reads.
std::vector<float> by_hdf5(const std::string& path, const std::string& name) {
  const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  REQUIRE(file >= 0);
  const hid_t dataset = H5Dopen2(file, name.c_str(), H5P_DEFAULT);
  const hid_t space = H5Dget_space(dataset);
  std::vector<float> values(static_cast<std::size_t>(H5Sget_simple_extent_npoints(space)));
  REQUIRE(H5Dread(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) >= 0);
  H5Sclose(space);
  H5Dclose(dataset);
  H5Fclose(file);
  return values;
}

/// All rows, `piece` at a time.
std::vector<float> by_rows(const TensorSource& source, Tensor tensor, std::int64_t piece) {
  const Problem& problem = source.problem();
  const std::int64_t row = heads_of(problem, tensor) * problem.head_dim;
  std::vector<float> values(static_cast<std::size_t>(problem.batch * problem.seq_len * row));
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    for (std::int64_t first = 0; first < problem.seq_len; first += piece) {
      source.read(tensor, batch, first, std::min(piece, problem.seq_len - first), DType::fp32,
                  values.data() + (batch * problem.seq_len + first) * row);
    }
  }
  return values;
}

/// The same elements, box by box of random extents.
std::vector<float> by_boxes(const TensorSource& source, Tensor tensor, std::mt19937& random) {
  const Problem& problem = source.problem();
  const std::array<std::int64_t, 4> extents{problem.batch, problem.seq_len, heads_of(problem, tensor), problem.head_dim};
  std::array<std::int64_t, 4> unit{};
  for (std::size_t axis = 0; axis < 4; ++axis) { unit[axis] = 1 + static_cast<std::int64_t>(random()) % extents[axis]; }
  std::vector<float> values(static_cast<std::size_t>(extents[0] * extents[1] * extents[2] * extents[3]));
  Box box;
  for (box.batch = 0; box.batch < extents[0]; box.batch += unit[0]) {
    for (box.row = 0; box.row < extents[1]; box.row += unit[1]) {
      for (box.head = 0; box.head < extents[2]; box.head += unit[2]) {
        for (box.dim = 0; box.dim < extents[3]; box.dim += unit[3]) {
          box.batches = std::min(unit[0], extents[0] - box.batch);
          box.rows = std::min(unit[1], extents[1] - box.row);
          box.heads = std::min(unit[2], extents[2] - box.head);
          box.dims = std::min(unit[3], extents[3] - box.dim);
          std::vector<float> read(static_cast<std::size_t>(box.batches * box.rows * box.heads * box.dims));
          source.read_box(tensor, box, read.data());
          const float* value = read.data();
          for (std::int64_t b = box.batch; b < box.batch + box.batches; ++b) {
            for (std::int64_t s = box.row; s < box.row + box.rows; ++s) {
              for (std::int64_t h = box.head; h < box.head + box.heads; ++h) {
                float* to = values.data() + ((b * extents[1] + s) * extents[2] + h) * extents[3] + box.dim;
                std::copy_n(value, box.dims, to);
                value += box.dims;
              }
            }
          }
        }
      }
    }
  }
  return values;
}

}  // namespace

TEST_CASE("a virtual dataset of parts of any shape and selection is read as HDF5 reads it", "[io][input]") {
  const unsigned seed = GENERATE(range(0U, 60U));
  CAPTURE(seed);
  std::mt19937 random(seed);
  const auto below = [&](hsize_t count) { return static_cast<hsize_t>(random()) % count; };
  const TemporaryFolder folder;
  const std::vector<hsize_t> extents{1 + below(2), 6 + below(30), 2, 2 + below(5)};
  // Every stride-th index of one axis is a part, or a range of rows; all is covered.
  const std::size_t cut_axis = below(3) == 0 ? below(4) : 1;
  const bool interleaved = below(2) == 0;
  const hsize_t count = std::min(extents[cut_axis], 1 + below(3));
  const bool nested = below(3) == 0;
  std::vector<Part> parts;
  for (hsize_t number = 0; number < count; ++number) {
    Part part{"part" + std::to_string(number) + ".h5", "x", {}};
    part.whole_start.assign(4, 0);
    part.whole_step.assign(4, 1);
    part.whole_count = extents;
    const hsize_t begin = extents[cut_axis] * number / count;
    part.whole_start[cut_axis] = interleaved ? number : begin;
    part.whole_step[cut_axis] = interleaved ? count : 1;
    part.whole_count[cut_axis] =
        interleaved ? (extents[cut_axis] - number + count - 1) / count : extents[cut_axis] * (number + 1) / count - begin;
    // The part's axes: those of the whole, without ones, or neighbours joined.
    std::vector<hsize_t> axes;
    for (const hsize_t extent : part.whole_count) {
      if (extent == 1 && below(2) == 0) { continue; }
      if (!axes.empty() && below(3) == 0) {
        axes.back() *= extent;
      } else {
        axes.push_back(extent);
      }
    }
    if (axes.empty()) { axes.push_back(1); }
    if (below(4) == 0) { std::reverse(axes.begin(), axes.end()); }
    part.count = axes;
    for (const hsize_t own : axes) {
      part.start.push_back(below(3));
      part.step.push_back(1 + (below(3) == 0 ? below(3) : 0));
      part.extents.push_back(part.start.back() + (own - 1) * part.step.back() + 1 + below(3));
    }
    const FileWriter file(folder.file(nested ? "inner-" + part.file : part.file));
    std::vector<hsize_t> chunk;
    if (below(4) != 0) {
      for (const hsize_t own : part.extents) { chunk.push_back(1 + below(own)); }
    }
    write_random(file.get(), "x", part.extents, chunk, below(3) != 0, below(3) == 0 ? H5T_IEEE_F32BE : H5T_IEEE_F32LE, random);
    if (nested) {
      Part all{"inner-" + part.file, "x", part.extents};
      all.whole_start.assign(part.extents.size(), 0);
      all.whole_step.assign(part.extents.size(), 1);
      all.whole_count = part.extents;
      write_virtual(folder.file(part.file), part.extents, {all}, {"x"});
    }
    parts.push_back(part);
  }
  const std::string path = folder.file("whole.h5");
  const bool big_endian = below(4) == 0;
  write_virtual(path, extents, parts, kNames, big_endian ? H5T_IEEE_F32BE : H5T_IEEE_F32LE);
  const std::vector<float> expected = by_hdf5(path, "k");

  const auto source = open_input(path);

  CHECK(by_rows(*source, Tensor::k, 1 + static_cast<std::int64_t>(below(8))) == expected);
  source->release_buffers();
  CHECK(by_rows(*source, Tensor::k, source->problem().seq_len) == expected);
  if (!big_endian) { CHECK(by_boxes(*source, Tensor::k, random) == expected); }
}

namespace {

/// A whole of rows 0..7 in parts of 4, compressed in chunks of 3 rows.
const std::vector<hsize_t> kWhole{1, 8, 2, 3};
const std::vector<hsize_t> kPartExtents{1, 4, 2, 3};
const std::vector<hsize_t> kChunk{1, 3, 2, 3};
constexpr std::size_t kChunkBytes = 72;

void write_part(const std::string& path, const std::vector<hsize_t>& extents = kPartExtents, const std::vector<hsize_t>& chunk = kChunk) {
  std::mt19937 random(1);
  const FileWriter file(path);
  for (const std::string& name : kNames) { write_random(file.get(), name, extents, chunk, true, H5T_IEEE_F32LE, random); }
}

/// Makes the chunk at `corner` of /k one that no filter went over, of so many bytes.
void store_chunk(const std::string& path, const std::string& name, const std::vector<hsize_t>& corner, std::size_t bytes) {
  const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
  REQUIRE(file >= 0);
  const hid_t dataset = H5Dopen2(file, name.c_str(), H5P_DEFAULT);
  const std::vector<char> zeros(bytes, 0);
  REQUIRE(H5Dwrite_chunk(dataset, H5P_DEFAULT, ~std::uint32_t{0}, corner.data(), bytes, zeros.data()) >= 0);
  H5Dclose(dataset);
  H5Fclose(file);
}

}  // namespace

TEST_CASE("a chunk of a part that decodes to another length than a chunk is refused, however the part is taken", "[io][input]") {
  const TemporaryFolder folder;
  const std::size_t bytes = GENERATE(as<std::size_t>(), kChunkBytes / 2, kChunkBytes - 1, kChunkBytes + 1, kChunkBytes * 2);
  const hsize_t row = GENERATE(hsize_t{0}, hsize_t{3});
  const auto layout = GENERATE(as<std::string>(), "rows", "every second row", "nested", "other shape", "the same file");
  CAPTURE(bytes, row, layout);
  const std::string broken = folder.file(layout == "the same file" ? "whole.h5" : "b.h5");
  const std::string path = folder.file("whole.h5");
  if (layout == "the same file") {
    // A file is written anew by write_virtual(), hence its parts are put there afterwards.
    Part first = rows_of(".", kWhole, 0, 4);
    Part second = rows_of(".", kWhole, 4, 4);
    first.dataset = "a";
    second.dataset = "b";
    write_virtual(path, kWhole, {first, second});
    std::mt19937 random(1);
    const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    for (const char* name : {"a", "b"}) { write_random(file, name, kPartExtents, kChunk, true, H5T_IEEE_F32LE, random); }
    H5Fclose(file);
  } else if (layout == "every second row") {
    Part even = rows_of("a.h5", kWhole, 0, 4);
    Part odd = rows_of("b.h5", kWhole, 1, 4);
    even.whole_step[1] = odd.whole_step[1] = 2;
    write_virtual(path, kWhole, {even, odd});
  } else if (layout == "other shape") {
    Part part = rows_of("b.h5", kWhole, 4, 4);
    part.extents = {24};
    write_virtual(path, kWhole, {rows_of("a.h5", kWhole, 0, 4), part});
  } else {
    write_virtual(layout == "nested" ? folder.file("inner.h5") : path, kWhole,
                  {rows_of("a.h5", kWhole, 0, 4), rows_of("b.h5", kWhole, 4, 4)});
    if (layout == "nested") { write_virtual(path, kWhole, {rows_of("inner.h5", kWhole, 0, 8)}); }
  }
  if (layout != "the same file") {
    write_part(folder.file("a.h5"));
    const bool flat = layout == "other shape";
    write_part(broken, flat ? std::vector<hsize_t>{24} : kPartExtents, flat ? std::vector<hsize_t>{18} : kChunk);
  }
  CHECK(by_rows(*open_input(path), Tensor::k, 3) == by_hdf5(path, "k"));

  const std::vector<hsize_t> corner =
      layout == "other shape" ? std::vector<hsize_t>{row == 0 ? 0U : 18U} : std::vector<hsize_t>{0, row, 0, 0};
  store_chunk(broken, layout == "the same file" ? "b" : "k", corner, bytes);

  const std::string message = fmt::format("in file '{}' is damaged: its chunk at [{}] decodes to {} bytes, and a chunk is 72", broken,
                                          fmt::join(corner, ", "), bytes);
  const auto source = open_input(path);
  CHECK_THROWS_WITH(by_rows(*source, Tensor::k, 3), contains_text(message));
  CHECK_THROWS_WITH(source->fingerprint(Tensor::k, 0, 1), contains_text(message));
}

TEST_CASE("a virtual dataset may have more parts than a process may have files open", "[io][input]") {
  const TemporaryFolder folder;
  constexpr hsize_t kParts = 150;
  const std::vector<hsize_t> extents{1, 4 * kParts, 2, 3};
  std::vector<Part> parts;
  for (hsize_t number = 0; number < kParts; ++number) {
    parts.push_back(rows_of(fmt::format("part{}.h5", number), extents, 4 * number, 4));
    write_part(folder.file(parts.back().file));
  }
  const std::string path = folder.file("whole.h5");
  write_virtual(path, extents, parts);
  const std::vector<float> expected = by_hdf5(path, "k");
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  rlimit few = before;
  few.rlim_cur = 250;
  setrlimit(RLIMIT_NOFILE, &few);

  const auto source = open_input(path);

  CHECK(by_rows(*source, Tensor::k, 7) == expected);
  CHECK(source->files().size() == kParts + 1);
  source->release_buffers();
  write_part(folder.file("part3.h5"));
  CHECK_THROWS_WITH(by_rows(*source, Tensor::k, 7), contains_text("part3.h5' was changed while it was read"));
  setrlimit(RLIMIT_NOFILE, &before);
}

namespace {

int decoded_chunks = 0;

std::size_t count_decoding(unsigned flags, std::size_t /*count*/, const unsigned* /*settings*/, std::size_t bytes,
                           std::size_t* /*capacity*/, void** /*buffer*/) {
  if ((flags & H5Z_FLAG_REVERSE) != 0) { ++decoded_chunks; }
  return bytes;
}

}  // namespace

TEST_CASE("chunks of a part that is taken row by row, in another order, are decoded once", "[io][input]") {
  const TemporaryFolder folder;
  constexpr hsize_t kRows = 400;
  const std::vector<hsize_t> extents{1, kRows, 2, 3};
  const test::RegisteredFilter filter(413, "counts", count_decoding);
  std::vector<Part> parts;
  for (const char* name : {"a.h5", "b.h5"}) { test::write_filtered(folder.file(name), 413, extents, 2, {1, 50, 2, 3}); }
  for (hsize_t row = 0; row < kRows; ++row) {
    Part part = rows_of(row % 2 == 0 ? "a.h5" : "b.h5", extents, row, 1);
    part.extents = extents;
    part.start = {0, kRows - 1 - row, 0, 0};
    part.step = {1, 1, 1, 1};
    part.count = {1, 1, 2, 3};
    parts.push_back(part);
  }
  const std::string path = folder.file("whole.h5");
  write_virtual(path, extents, parts);
  const std::vector<float> expected = by_hdf5(path, "k");
  const auto source = open_input(path);
  decoded_chunks = 0;

  CHECK(by_rows(*source, Tensor::k, 7) == expected);
  CHECK(decoded_chunks == 16);
}

TEST_CASE("of parts that overlap the last is read, and rows may come from one part in any choice along the axes", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("whole.h5");
  write_part(folder.file("a.h5"), kWhole);
  write_part(folder.file("b.h5"));
  write_virtual(path, kWhole, {rows_of("a.h5", kWhole, 0, 8), rows_of("b.h5", kWhole, 2, 4)});
  CHECK(by_rows(*open_input(path), Tensor::k, 3) == by_hdf5(path, "k"));

  // Rows 0, 1, 2, 4, 7 of a larger part, and rows of the whole as irregular; then a choice that differs from head to head.
  const auto write_irregular = [&](bool of_heads) {
    FileWriter file(path);
    for (const std::string& name : kNames) {
      const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
      const hid_t whole = space_of({1, 5, 2, 3});
      const hid_t part = space_of(kWhole);
      H5Sselect_none(part);
      for (const hsize_t row : {0, 1, 2, 4, 7}) {
        const std::array<hsize_t, 4> start{0, row, 0, 0};
        const std::array<hsize_t, 4> count{1, 1, of_heads ? 1U : 2U, 3};
        H5Sselect_hyperslab(part, H5S_SELECT_OR, start.data(), nullptr, count.data(), nullptr);
        const std::array<hsize_t, 4> other{0, row == 0 ? 3 : row, 1, 0};
        if (of_heads) { H5Sselect_hyperslab(part, H5S_SELECT_OR, other.data(), nullptr, count.data(), nullptr); }
      }
      REQUIRE(H5Pset_virtual(creation, whole, "a.h5", name.c_str(), part) >= 0);
      const hid_t dataset = H5Dcreate2(file.get(), name.c_str(), H5T_IEEE_F32LE, whole, H5P_DEFAULT, creation, H5P_DEFAULT);
      REQUIRE(dataset >= 0);
      H5Dclose(dataset);
      H5Sclose(part);
      H5Sclose(whole);
      H5Pclose(creation);
    }
  };
  write_irregular(false);
  CHECK(by_rows(*open_input(path), Tensor::k, 2) == by_hdf5(path, "k"));
  write_irregular(true);
  CHECK_THAT(refusal(path), contains_text("part /q in file") || contains_text("part q in file"));
  CHECK_THAT(refusal(path), contains_text("copy the whole into one dataset"));
}

TEST_CASE("kv_lengths may be virtual or compressed, and a short chunk of them is refused", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("input.h5");
  const std::vector<std::int64_t> lengths{3, 5};
  const auto write = [&](const std::string& to, hid_t type) {
    const hid_t file = H5Fopen(to.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    const hsize_t two = 2;
    H5Pset_chunk(creation, 1, &two);
    H5Pset_deflate(creation, 1);
    const hid_t space = space_of({2});
    const hid_t dataset = H5Dcreate2(file, "kv_lengths", type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
    REQUIRE(dataset >= 0);
    REQUIRE(H5Dwrite(dataset, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, lengths.data()) >= 0);
    H5Dclose(dataset);
    H5Sclose(space);
    H5Pclose(creation);
    H5Fclose(file);
  };
  const hid_t type = GENERATE(false, true) ? H5T_STD_I64BE : H5T_STD_I64LE;
  const bool is_virtual = GENERATE(false, true);
  CAPTURE(is_virtual);
  Part all{"lengths.h5", "", {2}};
  all.whole_start = {0};
  all.whole_step = {1};
  all.whole_count = {2};
  if (is_virtual) { write_virtual(path, {2}, {all}, {"kv_lengths"}, H5T_STD_I64LE); }
  const std::string holder = is_virtual ? folder.file("lengths.h5") : path;
  if (is_virtual) { const FileWriter made(holder); }
  {
    std::mt19937 random(1);
    if (!is_virtual) { const FileWriter made(path); }
    const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    for (const std::string& name : kNames) { write_random(file, name, {2, 8, 2, 3}, {}, false, H5T_IEEE_F32LE, random); }
    H5Fclose(file);
  }
  write(holder, type);
  CHECK(open_input(path)->problem().kv_lengths == lengths);

  store_chunk(holder, "kv_lengths", {0}, 8);

  CHECK_THAT(refusal(path), contains_text("/kv_lengths") && contains_text("decodes to 8 bytes, and a chunk is 16"));
}

namespace {

std::size_t flip(unsigned /*flags*/, std::size_t /*count*/, const unsigned* /*settings*/, std::size_t bytes, std::size_t* /*capacity*/,
                 void** buffer) {
  auto* byte = static_cast<unsigned char*>(*buffer);
  for (std::size_t index = 0; index < bytes; ++index) { byte[index] ^= 0x5aU; }
  return bytes;
}

constexpr H5Z_filter_t kFlip = 412;

herr_t refuse_settings(hid_t /*creation*/, hid_t /*type*/, hid_t /*space*/) { return -1; }

/// Writes settings of a newer version, as filters in use do.
herr_t renew_settings(hid_t creation, hid_t /*type*/, hid_t /*space*/) {
  const unsigned version = 2;
  return H5Pmodify_filter(creation, kFlip, H5Z_FLAG_MANDATORY, 1, &version);
}

}  // namespace

TEST_CASE("chunks are checked whose filter does not take its own settings for a new dataset", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("flipped.h5");
  const auto kind = GENERATE(as<std::string>(), "only decodes", "refuses", "renews");
  CAPTURE(kind);
  {
    const test::RegisteredFilter filter(kFlip, "flips", flip);
    test::write_filtered(path, kFlip, kWhole, 2, kChunk);
  }
  const H5Z_class2_t now{H5Z_CLASS_T_VERS,
                         kFlip,
                         kind == "only decodes" ? 0U : 1U,
                         1,
                         "flips",
                         nullptr,
                         kind == "refuses"  ? refuse_settings
                         : kind == "renews" ? renew_settings
                                            : nullptr,
                         flip};
  REQUIRE(H5Zregister(&now) >= 0);
  CHECK(by_rows(*open_input(path), Tensor::k, 3) == by_hdf5(path, "k"));

  store_chunk(path, "k", {0, 3, 0, 0}, kChunkBytes / 2);

  CHECK_THROWS_WITH(by_rows(*open_input(path), Tensor::k, 3),
                    contains_text("/k is damaged: its chunk at [0, 3, 0, 0] decodes to 36 bytes, and a chunk is 72"));
  H5Zunregister(kFlip);
}

TEST_CASE("stretches of rows end where chunks of all parts do", "[io][input]") {
  const auto stretches = [](const std::vector<ChunkGrid>& grids, std::int64_t seq_len, std::int64_t most) {
    std::vector<std::pair<std::int64_t, std::int64_t>> all;
    for (const RowBands::Stretch& own : chunk_stretches(grids, seq_len, most)) { all.emplace_back(own.first, own.chunk_rows); }
    return all;
  };
  using Rows = std::vector<std::pair<std::int64_t, std::int64_t>>;

  CHECK(stretches({{0, 100, 7}}, 100, 7) == Rows{{0, 7}});
  CHECK(stretches({}, 100, 7) == Rows{{0, 7}});
  // One part after another; the first ends inside a chunk.
  CHECK(stretches({{0, 25, 10}, {25, 60, 10, 25}}, 60, 10) == Rows{{0, 10}, {25, 10}});
  CHECK(stretches({{0, 30, 30}, {30, 80, 50, 30}, {80, 131, 51, 80}}, 131, 51) == Rows{{0, 30}, {30, 50}, {80, 51}});
  // Taken from inside a part, whose first chunk is then shorter.
  CHECK(stretches({{0, 24, 10, 4}}, 24, 10) == Rows{{0, 4}, {4, 10}});
  // Side by side: where both end.
  CHECK(stretches({{0, 24, 4}, {0, 24, 6}}, 24, 12) == Rows{{0, 12}});
  // Every second row of each.
  CHECK(stretches({{0, 39, 20, 0, 2}, {1, 40, 20, 1, 2}}, 40, 20) == Rows{{0, 20}});
  // Across each other: there is no such end.
  CHECK(stretches({{0, 100, 10}, {0, 100, 10, 5}}, 100, 10) == Rows{{0, 10}});
  // What nothing decodes lies between.
  CHECK(stretches({{0, 20, 10}, {50, 70, 10, 50}}, 80, 40) == Rows{{0, 10}, {20, 30}, {60, 10}});

  RowBands bands;
  bands.seq_len = 60;
  bands.row_bytes = 3;
  bands.stretches = {{0, 10, 20}, {25, 10, 30}};
  const auto at = [&](std::int64_t row) {
    const RowBands::Band band = bands.band_at(row);
    return std::pair{band.first, band.count};
  };
  CHECK(at(0) == std::pair<std::int64_t, std::int64_t>{0, 20});
  CHECK(at(24) == std::pair<std::int64_t, std::int64_t>{20, 5});
  CHECK(at(25) == std::pair<std::int64_t, std::int64_t>{25, 30});
  CHECK(at(59) == std::pair<std::int64_t, std::int64_t>{55, 5});
  CHECK(bands.bytes() == 90);
}
