// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/io/result_file.hpp>
#include <annulus/io/source.hpp>
#include <annulus_test.hpp>

#include "hdf5_fixture.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace annulus;
using test::contains_text;
using test::FileWriter;
using test::refusal;
using test::TemporaryFolder;

const std::string kSample = std::string(ANNULUS_TEST_DATA) + "/attention_sample.h5";

/// A valid fp32 file of zeros except that the dataset `name`, if any, has another type or shape.
void write_case(const std::string& path, const std::string& name, hid_t type, const std::vector<hsize_t>& extents) {
  FileWriter file(path);
  for (const std::string dataset : {"q", "k", "v"}) {
    const bool changed = dataset == name;
    file.dataset(dataset, changed ? type : H5T_IEEE_F32LE,
                 changed ? extents : std::vector<hsize_t>{2, 10, dataset == "q" ? hsize_t{6} : 3, 8});
  }
}

template <class Value>
Value big_endian(Value value) {
  auto bytes = std::bit_cast<std::array<std::uint8_t, sizeof(Value)>>(value);
  std::reverse(bytes.begin(), bytes.end());
  return std::bit_cast<Value>(bytes);
}

}  // namespace

TEST_CASE("the sample file opens with its shapes, dtype and scale", "[io][input]") {
  const auto source = open_input(kSample);

  const Problem& problem = source->problem();
  CHECK(problem.batch == 1);
  CHECK(problem.seq_len == 1900);
  CHECK(problem.heads == 9);
  CHECK(problem.kv_heads == 3);
  CHECK(problem.head_dim == 64);
  CHECK(problem.dtype == DType::fp16);
  CHECK(problem.scale == 0.125);
  CHECK_FALSE(problem.causal);
  CHECK(source->describe() == "file " + kSample);
}

TEST_CASE("rows read alone equal the same rows of the whole dataset, in every dtype", "[io][input]") {
  const auto source = open_input(kSample);
  const test::RawDataset whole(kSample, "/k");
  const std::int64_t row = 3 * 64;
  const std::int64_t first = 1234;
  const std::int64_t count = 567;
  std::vector<std::uint16_t> fp16(static_cast<std::size_t>(count * row));
  std::vector<std::uint16_t> bf16(fp16.size());
  std::vector<float> fp32(fp16.size());

  source->read(Tensor::k, 0, first, count, DType::fp16, fp16.data());
  source->read(Tensor::k, 0, first, count, DType::bf16, bf16.data());
  source->read(Tensor::k, 0, first, count, DType::fp32, fp32.data());

  const std::uint16_t* expected = whole.as<std::uint16_t>() + first * row;
  bool equal = true;
  for (std::size_t i = 0; i < fp16.size(); ++i) {
    const float wide = kernels::from_fp16_bits(expected[i]);
    equal = equal && fp16[i] == expected[i] && fp32[i] == wide && bf16[i] == kernels::to_bf16_bits(wide);
  }
  CHECK(equal);
}

TEST_CASE("lengths of keys are int64, one for each batch entry, inside the sequence", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder / "lengths.h5";
  const auto write = [&](hid_t type, const std::vector<hsize_t>& extents, const void* lengths) {
    test::FileWriter file(path);
    for (const char* name : {"q", "k", "v"}) { file.dataset(name, H5T_IEEE_F32LE, {2, 5, 1, 4}); }
    file.dataset("kv_lengths", type, extents, lengths);
  };
  const std::vector<std::int64_t> lengths{5, 2};
  write(H5T_STD_I64LE, {2}, lengths.data());
  CHECK(open_input(path)->problem().kv_lengths == lengths);
  const std::vector<std::int64_t> swapped{big_endian(lengths[0]), big_endian(lengths[1])};
  write(H5T_STD_I64BE, {2}, swapped.data());
  CHECK(open_input(path)->problem().kv_lengths == lengths);

  const std::vector<std::int64_t> outside{5, 6};
  write(H5T_STD_I64LE, {2}, outside.data());
  CHECK_THAT(test::refusal(path), test::contains_text("kv-lengths: 6 is outside 1..5"));
  write(H5T_STD_I64LE, {2}, nullptr);
  CHECK_THAT(test::refusal(path), test::contains_text("kv-lengths: 0 is outside 1..5"));
  write(H5T_STD_I64LE, {1, 2}, nullptr);
  CHECK_THAT(test::refusal(path), test::contains_text("/kv_lengths is [1, 2]; it must be [2], one number for each batch entry"));
  write(H5T_STD_I64LE, {3}, nullptr);
  CHECK_THAT(test::refusal(path), test::contains_text("/kv_lengths is [3]"));
  for (const hid_t type : {H5T_STD_U64LE, H5T_STD_I32LE, H5T_IEEE_F64LE}) {
    write(type, {2}, nullptr);
    CHECK_THAT(test::refusal(path), test::contains_text("allowed is int64"));
  }
}

TEST_CASE("extra keys and their values differ from K and V in their rows only, and come together", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder / "extra.h5";
  const auto with = [&](const std::vector<hsize_t>& keys, const std::vector<hsize_t>& values, hid_t type = H5T_IEEE_F32LE) {
    test::FileWriter file(path);
    for (const char* name : {"q", "k", "v"}) { file.dataset(name, H5T_IEEE_F32LE, {2, 5, 1, 4}); }
    if (!keys.empty()) { file.dataset("k_extra", H5T_IEEE_F32LE, keys); }
    if (!values.empty()) { file.dataset("v_extra", type, values); }
  };
  with({2, 7, 1, 4}, {2, 7, 1, 4});
  CHECK(open_input(path)->problem().extra_keys == 7);
  with({}, {});
  CHECK(open_input(path)->problem().extra_keys == 0);
  with({2, 7, 1, 4}, {});
  CHECK_THAT(test::refusal(path), contains_text("has /k_extra without /v_extra"));
  with({}, {2, 7, 1, 4});
  CHECK_THAT(test::refusal(path), contains_text("has /v_extra without /k_extra"));
  with({1, 7, 1, 4}, {1, 7, 1, 4});
  CHECK_THAT(test::refusal(path), contains_text("/k is [2, 5, 1, 4] but /k_extra is [1, 7, 1, 4]; they may differ in their rows only"));
  with({7, 1, 4}, {7, 1, 4});
  CHECK_THAT(test::refusal(path), contains_text("/k_extra is [7, 1, 4]"));
  with({2, 7, 1, 4}, {2, 6, 1, 4});
  CHECK_THAT(test::refusal(path), contains_text("/k_extra is [2, 7, 1, 4] but /v_extra is [2, 6, 1, 4]"));
  const hid_t fp16 = test::make_half_type(5);
  with({2, 7, 1, 4}, {2, 7, 1, 4}, fp16);
  CHECK_THAT(test::refusal(path), contains_text("/k is fp32 but /v_extra is fp16"));
  H5Tclose(fp16);

  std::vector<float> values(2 * 7 * 4, 1.0F);
  values[(1 * 7 + 2) * 4 + 3] = std::numeric_limits<float>::quiet_NaN();
  {
    test::FileWriter file(path);
    for (const char* name : {"q", "k", "v"}) { file.dataset(name, H5T_IEEE_F32LE, {2, 5, 1, 4}); }
    file.dataset("k_extra", H5T_IEEE_F32LE, {2, 7, 1, 4});
    file.dataset("v_extra", H5T_IEEE_F32LE, {2, 7, 1, 4}, values.data());
  }
  const auto source = open_input(path);
  std::vector<float> out(7 * 4);
  CHECK_NOTHROW(source->read(Tensor::v_extra, 0, 0, 7, DType::fp32, out.data()));
  CHECK_THROWS_WITH(source->read(Tensor::v_extra, 1, 0, 7, DType::fp32, out.data()), contains_text("/v_extra[1, 2, 0, 3] is nan"));
  CHECK_THROWS_AS(source->read(Tensor::k_extra, 0, 0, 8, DType::fp32, out.data()), InvalidArgument);
  CHECK(source->fingerprints(0, 1).size() == 5);
}

TEST_CASE("several threads read one source at once", "[io][input]") {
  const auto source = open_input(kSample);
  const test::RawDataset whole(kSample, "/q");
  std::atomic<int> wrong{0};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 4; ++reader) {
    readers.emplace_back([&, reader] {
      std::vector<std::uint16_t> rows(9 * 64 * 100);
      for (std::int64_t first = reader * 100; first + 100 <= 1900; first += 400) {
        source->read(Tensor::q, 0, first, 100, DType::fp16, rows.data());
        wrong += std::memcmp(rows.data(), whole.as<std::uint16_t>() + first * 9 * 64, rows.size() * 2) == 0 ? 0 : 1;
      }
    });
  }
  for (auto& reader : readers) { reader.join(); }

  CHECK(wrong == 0);
}

TEST_CASE("reads longer than one chunk are rounded once from fp32 to nearest even", "[io][input]") {
  const TemporaryFolder folder;
  Problem problem;
  problem.batch = 2;
  problem.seq_len = 9001;
  problem.heads = 6;
  problem.kv_heads = 2;
  problem.head_dim = 80;
  problem.scale = 0.3;
  const std::string path = folder.file("generated.h5");
  write_generated_input(path, false, problem, 11);
  const auto source = open_input(path);
  const auto generator = make_generator(problem, 11);
  CHECK(source->problem() == problem);
  const std::size_t elements = 9001 * 6 * 80;
  std::vector<float> expected(elements);
  std::vector<float> wide(elements);
  std::vector<std::uint16_t> narrow(elements);

  generator->read(Tensor::q, 1, 0, 9001, DType::fp32, expected.data());
  source->read(Tensor::q, 1, 0, 9001, DType::fp32, wide.data());
  source->read(Tensor::q, 1, 0, 9001, DType::fp16, narrow.data());

  CHECK(wide == expected);
  bool equal = true;
  for (std::size_t i = 0; i < elements; ++i) { equal = equal && narrow[i] == kernels::to_fp16_bits(expected[i]); }
  CHECK(equal);
}

TEST_CASE("generated files hold what the generator gives, in every dtype", "[io][input]") {
  const TemporaryFolder folder;
  for (const DType dtype : {DType::fp32, DType::fp16, DType::bf16}) {
    Problem problem;
    problem.seq_len = 77;
    problem.heads = 4;
    problem.kv_heads = 2;
    problem.head_dim = 24;
    problem.dtype = dtype;
    problem.extra_keys = 3;
    const std::string path = folder.file("generated.h5");
    write_generated_input(path, true, problem, 9);
    const auto source = open_input(path);
    const auto generator = make_generator(problem, 9);

    CHECK(source->problem() == problem);
    for (const Tensor tensor : tensors_of(problem)) {
      const std::int64_t rows = rows_of(problem, tensor);
      const std::size_t bytes = static_cast<std::size_t>(rows * (tensor == Tensor::q ? 4 : 2) * 24 * size_of(dtype));
      std::vector<std::uint8_t> from_file(bytes);
      std::vector<std::uint8_t> from_generator(bytes);
      source->read(tensor, 0, 0, rows, dtype, from_file.data());
      generator->read(tensor, 0, 0, rows, dtype, from_generator.data());
      CHECK(from_file == from_generator);
    }
  }
  CHECK(folder.names().size() == 1);
  CHECK_THROWS_WITH(write_generated_input(folder.file("generated.h5"), false, Problem{}, 1),
                    contains_text("exists") && contains_text("--force"));
}

TEST_CASE("three-dimensional datasets are one batch entry", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("three.h5");
  std::vector<float> q(5 * 2 * 3);
  for (std::size_t i = 0; i < q.size(); ++i) { q[i] = static_cast<float>(i); }
  {
    FileWriter file(path);
    file.dataset("q", H5T_IEEE_F32LE, {5, 2, 3}, q.data());
    file.dataset("k", H5T_IEEE_F32LE, {5, 1, 3});
    file.dataset("v", H5T_IEEE_F32LE, {5, 1, 3});
  }
  const auto source = open_input(path);
  std::vector<float> rows(2 * 2 * 3);
  source->read(Tensor::q, 0, 3, 2, DType::fp32, rows.data());

  CHECK(source->problem().batch == 1);
  CHECK(source->problem().seq_len == 5);
  CHECK(source->problem().scale == 1.0 / std::sqrt(3.0));
  CHECK(rows == std::vector<float>(q.begin() + 18, q.end()));
}

TEST_CASE("big-endian files give the same values", "[io][input]") {
  const TemporaryFolder folder;
  std::vector<float> fp32;
  for (int i = 0; i < 24; ++i) { fp32.push_back(static_cast<float>(i) * 0.37F - 3.0F); }
  std::vector<float> swapped;
  std::vector<std::uint16_t> half_swapped;
  for (const float value : fp32) {
    swapped.push_back(big_endian(value));
    half_swapped.push_back(big_endian(kernels::to_bf16_bits(value)));
  }
  const hid_t bf16 = test::make_half_type(8);
  H5Tset_order(bf16, H5T_ORDER_BE);
  const double scale = big_endian(0.75);
  for (const bool narrow : {false, true}) {
    const std::string path = folder.file(narrow ? "bf16.h5" : "fp32.h5");
    {
      FileWriter file(path);
      for (const char* name : {"q", "k", "v"}) {
        file.dataset(name, narrow ? bf16 : H5T_IEEE_F32BE, {1, 4, 2, 3},
                     narrow ? static_cast<const void*>(half_swapped.data()) : swapped.data());
      }
      file.attribute("scale", H5T_IEEE_F64BE, &scale);
    }
    const auto source = open_input(path);
    std::vector<float> values(24);
    source->read(Tensor::v, 0, 0, 4, DType::fp32, values.data());

    CHECK(source->problem().dtype == (narrow ? DType::bf16 : DType::fp32));
    CHECK(source->problem().scale == 0.75);
    bool equal = true;
    for (std::size_t i = 0; i < 24; ++i) {
      equal = equal && values[i] == (narrow ? kernels::from_bf16_bits(kernels::to_bf16_bits(fp32[i])) : fp32[i]);
    }
    CHECK(equal);
  }
  H5Tclose(bf16);
}

TEST_CASE("the attribute scale is read in any float type and refused otherwise", "[io][input]") {
  const TemporaryFolder folder;
  const hid_t fp16 = test::make_half_type(5);
  const double wide = 0.1;
  const float single = 0.1F;
  const std::uint16_t half = kernels::to_fp16_bits(0.1F);
  const std::int64_t integer = 1;
  const double infinite = std::numeric_limits<double>::infinity();
  const double two[2] = {1, 2};
  const auto write = [&](const char* name, hid_t type, const void* value, const std::vector<hsize_t>& extents) {
    const std::string path = folder.file(name);
    write_case(path, "", -1, {});
    const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    const hid_t space = extents.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(1, extents.data(), nullptr);
    const hid_t attribute = H5Acreate2(file, "scale", type, space, H5P_DEFAULT, H5P_DEFAULT);
    REQUIRE(H5Awrite(attribute, type, value) >= 0);
    H5Aclose(attribute);
    H5Sclose(space);
    H5Fclose(file);
    return path;
  };

  CHECK(open_input(write("f64.h5", H5T_IEEE_F64LE, &wide, {}))->problem().scale == 0.1);
  CHECK(open_input(write("f64-1.h5", H5T_IEEE_F64LE, &wide, {1}))->problem().scale == 0.1);
  CHECK(open_input(write("f32.h5", H5T_IEEE_F32LE, &single, {}))->problem().scale == static_cast<double>(0.1F));
  CHECK(open_input(write("f16.h5", fp16, &half, {}))->problem().scale == static_cast<double>(kernels::from_fp16_bits(half)));
  CHECK_THAT(refusal(write("int.h5", H5T_STD_I64LE, &integer, {})), contains_text("scale (64-bit integer)"));
  CHECK_THAT(refusal(write("two.h5", H5T_IEEE_F64LE, two, {2})), contains_text("scale") && contains_text("one float"));
  CHECK_THAT(refusal(write("inf.h5", H5T_IEEE_F64LE, &infinite, {})), contains_text("scale is inf"));
  H5Tclose(fp16);
}

TEST_CASE("files that cannot be read are refused with the reason", "[io][input]") {
  const TemporaryFolder folder;
  const std::string text = folder.file("text.h5");
  std::ofstream(text) << "q k v\n";
  const std::string empty = folder.file("empty.h5");
  std::ofstream(empty) << "";
  const auto truncated = [&](std::uintmax_t bytes) {
    const std::string path = folder.file("truncated-" + std::to_string(bytes) + ".h5");
    std::filesystem::copy_file(kSample, path);
    std::filesystem::resize_file(path, bytes);
    return path;
  };

  CHECK_THAT(refusal(folder.file("absent.h5")), contains_text("No such file"));
  CHECK_THAT(refusal(folder.file("")), contains_text("folder"));
  CHECK_THAT(refusal("/dev/null"), contains_text("not a regular file"));
  CHECK_THAT(refusal(text), contains_text("not an HDF5 file"));
  CHECK_THAT(refusal(empty), contains_text("not an HDF5 file"));
  for (const std::uintmax_t bytes : {2000000U, 100000U, 5000U, 700U, 100U}) {
    INFO(bytes << " bytes");
    CHECK_THAT(refusal(truncated(bytes)), contains_text("truncated file") || contains_text("damaged"));
  }
  CHECK_THAT(refusal(truncated(40)), contains_text("not an HDF5 file") || contains_text("damaged"));
}

TEST_CASE("datasets that are missing, of another kind, type or shape are refused by name", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("case.h5");
  const hid_t odd_half = test::make_half_type(6);
  const auto with = [&](const std::string& name, hid_t type, const std::vector<hsize_t>& extents) {
    write_case(path, name, type, extents);
    return refusal(path);
  };

  CHECK(with("", -1, {}) == "accepted");
  {
    FileWriter file(path);
    file.dataset("q", H5T_IEEE_F32LE, {1, 2, 3, 4});
    file.dataset("k", H5T_IEEE_F32LE, {1, 2, 3, 4});
  }
  CHECK_THAT(refusal(path), contains_text("has no dataset /v"));
  {
    FileWriter file(path);
    H5Lcreate_soft("/nowhere", file.get(), "q", H5P_DEFAULT, H5P_DEFAULT);
  }
  CHECK_THAT(refusal(path), contains_text("has no dataset /q"));
  {
    FileWriter file(path);
    H5Gclose(H5Gcreate2(file.get(), "q", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  }
  CHECK_THAT(refusal(path), contains_text("/q is not a dataset"));

  CHECK_THAT(with("v", H5T_IEEE_F64LE, {2, 10, 3, 8}), contains_text("/v holds 64-bit float") && contains_text("fp32, fp16 and bf16"));
  CHECK_THAT(with("q", H5T_STD_I32LE, {2, 10, 6, 8}), contains_text("/q holds 32-bit integer"));
  CHECK_THAT(with("q", H5T_STD_U16LE, {2, 10, 6, 8}), contains_text("/q holds 16-bit unsigned integer"));
  CHECK_THAT(with("k", odd_half, {2, 10, 3, 8}), contains_text("/k holds 16-bit float"));
  CHECK_THAT(with("q", H5T_IEEE_F32LE, {10, 6}), contains_text("/q has 2 dimensions"));
  CHECK_THAT(with("q", H5T_IEEE_F32LE, {1, 2, 10, 6, 8}), contains_text("/q has 5 dimensions"));
  CHECK_THAT(with("q", H5T_IEEE_F32LE, {10, 6, 8}), contains_text("/q is [10, 6, 8]") && contains_text("[2, 10, 3, 8]"));
  CHECK_THAT(with("q", H5T_IEEE_F32LE, {2, 0, 6, 8}), contains_text("/q is [2, 0, 6, 8]") && contains_text("at least 1"));
  CHECK_THAT(with("v", H5T_IEEE_F32LE, {2, 10, 2, 8}), contains_text("/k is [2, 10, 3, 8]") && contains_text("/v is [2, 10, 2, 8]"));
  CHECK_THAT(with("q", H5T_IEEE_F32LE, {1, 10, 6, 8}), contains_text("/q is [1, 10, 6, 8]"));
  CHECK_THAT(with("q", H5T_IEEE_F32LE, {2, 11, 6, 8}), contains_text("/q is [2, 11, 6, 8]"));
  CHECK_THAT(with("q", H5T_IEEE_F32LE, {2, 10, 6, 16}), contains_text("/q is [2, 10, 6, 16]"));
  CHECK_THAT(with("q", H5T_IEEE_F32LE, {2, 10, 7, 8}), contains_text("3 heads of /k and /v do not divide the 7 heads of /q"));
  const hid_t fp16 = test::make_half_type(5);
  CHECK_THAT(with("v", fp16, {2, 10, 3, 8}), contains_text("/q is fp32 but /v is fp16"));
  {
    FileWriter file(path);
    for (const char* name : {"q", "k", "v"}) { file.dataset(name, fp16, {1, 1, 1, 257}); }
  }
  CHECK_THAT(refusal(path), contains_text("[1, 1, 1, 257]") && contains_text("at most 256"));
  H5Tclose(fp16);
  H5Tclose(odd_half);
}

TEST_CASE("NaN, infinity and overflow in the input are refused with dataset and first index", "[io][input]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("values.h5");
  const auto write = [&](float bad, const std::vector<hsize_t>& extents, std::size_t index) {
    std::vector<float> values(2 * 10 * 3 * 8, 1.0F);
    values[index] = bad;
    values.back() = bad;
    FileWriter file(path);
    file.dataset("q", H5T_IEEE_F32LE, extents);
    file.dataset("k", H5T_IEEE_F32LE, extents);
    file.dataset("v", H5T_IEEE_F32LE, extents, values.data());
  };
  std::vector<float> out(20 * 3 * 8);
  const std::size_t index = ((1 * 10 + 7) * 3 + 2) * 8 + 5;

  write(std::numeric_limits<float>::quiet_NaN(), {2, 10, 3, 8}, index);
  {
    const auto source = open_input(path);
    CHECK_NOTHROW(source->read(Tensor::v, 0, 0, 10, DType::fp32, out.data()));
    CHECK_NOTHROW(source->read(Tensor::v, 1, 0, 7, DType::fp32, out.data()));
    CHECK_THROWS_MATCHES(source->read(Tensor::v, 1, 4, 6, DType::fp16, out.data()), InvalidArgument,
                         Catch::Matchers::Message("input file '" + path + "': /v[1, 7, 2, 5] is nan; every value must be finite"));
  }
  write(-std::numeric_limits<float>::infinity(), {20, 3, 8}, index);
  CHECK_THROWS_WITH(open_input(path)->read(Tensor::v, 0, 0, 20, DType::fp32, out.data()), contains_text("/v[17, 2, 5] is -inf"));
  write(65519.0F, {2, 10, 3, 8}, index);
  CHECK_NOTHROW(open_input(path)->read(Tensor::v, 1, 0, 10, DType::fp16, out.data()));
  write(65520.0F, {2, 10, 3, 8}, index);
  CHECK_NOTHROW(open_input(path)->read(Tensor::v, 1, 0, 10, DType::bf16, out.data()));
  CHECK_THROWS_WITH(open_input(path)->read(Tensor::v, 1, 0, 10, DType::fp16, out.data()),
                    contains_text("/v[1, 7, 2, 5] is 65520, which overflows fp16"));
}

TEST_CASE("rows outside the file are refused", "[io][input]") {
  const auto source = open_input(kSample);
  std::vector<std::uint16_t> out(9 * 64);

  CHECK_THROWS_AS(source->read(Tensor::q, 0, 1900, 1, DType::fp16, out.data()), InvalidArgument);
  CHECK_THROWS_AS(source->read(Tensor::q, 1, 0, 1, DType::fp16, out.data()), InvalidArgument);
  CHECK_THROWS_AS(source->read(Tensor::q, 0, -1, 1, DType::fp16, out.data()), InvalidArgument);
  CHECK_NOTHROW(source->read(Tensor::q, 0, 1900, 0, DType::fp16, out.data()));
}
