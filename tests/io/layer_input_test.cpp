// SPDX-License-Identifier: Apache-2.0
// Files of a layer: what they may hold, what is read of them, and what is refused.
#include <annulus/io/examine_input.hpp>
#include <annulus/io/layer_source.hpp>

#include "hdf5_fixture.hpp"

#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

using namespace annulus;
using annulus::test::FileWriter;
using annulus::test::TemporaryFolder;

namespace {

using Shapes = std::map<std::string, std::vector<hsize_t>>;

/// batch 2, seq 3, embed 5; 4 heads of 2, 2 KV heads.
Shapes shapes() { return {{"x", {2, 3, 5}}, {"wq", {8, 5}}, {"wk", {4, 5}}, {"wv", {4, 5}}, {"wo", {5, 8}}}; }

std::vector<float> numbers(const std::vector<hsize_t>& extents) {
  const hsize_t count = std::accumulate(extents.begin(), extents.end(), hsize_t{1}, std::multiplies<>());
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 0.0F);
  return values;
}

void write_layer(const std::string& path, const Shapes& all, std::optional<std::int64_t> heads = 4,
                 const std::function<void(FileWriter&)>& more = {}) {
  FileWriter file(path);
  for (const auto& [name, extents] : all) { file.dataset(name, H5T_IEEE_F32LE, extents, numbers(extents).data()); }
  if (heads) { file.attribute("heads", H5T_STD_I64LE, &*heads); }
  if (more) { more(file); }
}

std::string refusal_of(const std::string& path, std::optional<std::int64_t> heads = std::nullopt) {
  std::string message = "accepted";
  try {
    open_layer_input(path, heads);
  } catch (const InvalidArgument& error) { message = error.what(); }
  std::string examined = "accepted";
  try {
    examine_layer_input(path, heads);
  } catch (const InvalidArgument& error) { examined = error.what(); }
  CHECK(examined == message);
  return message;
}

}  // namespace

TEST_CASE("a layer's file says its extents, and its rows and weights are read as they are stored") {
  const TemporaryFolder folder;
  const std::string path = folder / "layer.h5";
  Shapes all = shapes();
  all["x_key"] = {2, 3, 7};
  all["wk"] = {4, 7};
  all["bo"] = {5};
  all["q_norm_weight"] = {2};
  const double base = 500;
  const std::vector<std::int64_t> lengths{3, 1};
  write_layer(path, all, 4, [&](FileWriter& file) {
    file.attribute("rope_base", H5T_IEEE_F64LE, &base);
    const hid_t text = H5Tcopy(H5T_C_S1);
    H5Tset_size(text, 4);
    file.attribute("rope_pairs", text, "half");
    H5Tclose(text);
    file.dataset("kv_lengths", H5T_STD_I64LE, {2}, lengths.data());
  });

  examine_layer_input(path, std::nullopt);
  const auto source = open_layer_input(path, std::nullopt);

  const Problem& problem = source->problem();
  CHECK((problem.batch == 2 && problem.seq_len == 3 && problem.heads == 4 && problem.kv_heads == 2 && problem.head_dim == 2));
  CHECK(problem.kv_lengths == lengths);
  const Layer& layer = source->layer();
  CHECK((layer.embed == 5 && layer.kdim == 7 && layer.vdim == 5 && layer.bias));
  CHECK((layer.rotary == RotaryPairs::half && layer.rotary_base == 500));
  CHECK((source->has(Activation::x_key) && !source->has(Activation::x_value) && source->has(Weight::bo) && !source->has(Weight::wg)));
  CHECK(source->extents(Weight::q_norm_weight) == std::vector<std::int64_t>{2});
  std::vector<float> rows(2 * 7);
  source->read(Activation::x_key, 1, 1, 2, DType::fp32, rows.data());
  CHECK((rows.front() == 28 && rows.back() == 41));
  std::vector<std::uint16_t> halves(5);
  source->read(Activation::x, 0, 2, 1, DType::fp16, halves.data());
  CHECK(kernels::from_fp16_bits(halves[3]) == 13);
  CHECK(source->weights(Weight::wk) == numbers({4, 7}));
  CHECK_THROWS_AS(source->read(Activation::x, 0, 2, 2, DType::fp32, rows.data()), InvalidArgument);
}

TEST_CASE("a 2-D x is one batch entry, 16-bit and filtered datasets are read, and --heads stands in for the attribute") {
  const TemporaryFolder folder;
  const std::string path = folder / "layer.h5";
  {
    FileWriter file(path);
    const hid_t bf16 = test::make_half_type(8);
    std::vector<std::uint16_t> x;
    for (int i = 0; i < 15; ++i) { x.push_back(kernels::to_bf16_bits(static_cast<float>(i))); }
    file.dataset("x", bf16, {3, 5}, x.data());
    H5Tclose(bf16);
    for (const auto& [name, extents] : shapes()) {
      if (name == "x") { continue; }
      const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
      const std::vector<hsize_t> chunk{3, 2};
      H5Pset_chunk(creation, 2, chunk.data());
      H5Pset_deflate(creation, 1);
      const hid_t space = H5Screate_simple(2, extents.data(), nullptr);
      const hid_t dataset = H5Dcreate2(file.get(), name.c_str(), H5T_IEEE_F32BE, space, H5P_DEFAULT, creation, H5P_DEFAULT);
      REQUIRE(H5Dwrite(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, numbers(extents).data()) >= 0);
      H5Dclose(dataset);
      H5Sclose(space);
      H5Pclose(creation);
    }
  }

  const auto source = open_layer_input(path, 2);

  CHECK(
      (source->problem().batch == 1 && source->problem().heads == 2 && source->problem().head_dim == 4 && source->problem().kv_heads == 1));
  CHECK(source->problem().dtype == DType::bf16);
  std::vector<float> rows(10);
  source->read(Activation::x, 0, 1, 2, DType::fp32, rows.data());
  CHECK((rows.front() == 5 && rows.back() == 14));
  CHECK(source->weights(Weight::wo) == numbers({5, 8}));
  CHECK(open_layer_input(path, 8)->problem().kv_heads == 4);
  std::uint64_t whole = 0;
  std::uint64_t shared = 0;
  for (const Fingerprint& one : source->fingerprints(0, 1)) { whole += one.sum; }
  for (const std::int64_t part : {0, 1, 2}) {
    for (const Fingerprint& one : source->fingerprints(part, 3)) { shared += one.sum; }
  }
  CHECK(whole == shared);
  CHECK(source->fingerprints(0, 1).size() == 5);
}

TEST_CASE("files that are no layer are refused by the dataset that is wrong, alike by the examination") {
  const TemporaryFolder folder;
  const std::string path = folder / "layer.h5";
  const auto with = [&](const std::string& name, const std::vector<hsize_t>& extents, const std::string& part) {
    Shapes all = shapes();
    all[name] = extents;
    write_layer(path, all);
    INFO(name);
    CHECK_THAT(refusal_of(path), test::contains_text(part));
  };
  for (const char* name : {"x", "wq", "wk", "wv", "wo"}) {
    Shapes all = shapes();
    all.erase(name);
    write_layer(path, all);
    CHECK_THAT(refusal_of(path), test::contains_text(std::string("has no dataset /") + name));
  }
  with("x", {30}, "/x has 1 dimensions");
  with("x_key", {2, 4, 5}, "they may differ in their last extent only");
  with("wq", {8, 6}, "/wq is [8, 6]; [heads * head_dim, embed] must be [8, 5]");
  with("wq", {7, 5}, "whose 7 rows are not those of 4 heads");
  with("wk", {3, 5}, "/wk is [3, 5], whose 3 rows");
  with("wk", {6, 5}, "kv-heads 3 does not divide heads 4");
  with("wv", {8, 5}, "/wv is [8, 5]");
  with("wo", {8, 5}, "/wo is [8, 5]; [embed, heads * head_dim] must be [5, 8]");
  with("bq", {5}, "/bq is [5]");
  with("bias_k", {4}, "has /bias_k without /bias_v");
  with("bias_v", {8}, "/bias_v is [8]; [kv_heads * head_dim] must be [4]");
  with("o_norm_weight", {4}, "it must be [8] for rows or [2] for heads");
  with("k_norm_bias", {8}, "it must be [4] for rows or [2] for heads");
  write_layer(path, shapes(), std::nullopt);
  CHECK_THAT(refusal_of(path), test::contains_text("no attribute heads, and --heads is not given"));
  CHECK(refusal_of(path, 4) == "accepted");
  write_layer(path, shapes());
  CHECK_THAT(refusal_of(path, 2), test::contains_text("--heads 2 contradicts"));
  write_layer(path, shapes(), 4, [](FileWriter& file) {
    const hid_t text = H5Tcopy(H5T_C_S1);
    H5Tset_size(text, 5);
    file.attribute("rope_pairs", text, "other");
    H5Tclose(text);
  });
  CHECK_THAT(refusal_of(path), test::contains_text("rope_pairs is not one of none, neighbouring, half"));
  Shapes without_x = shapes();
  without_x.erase("x");
  write_layer(path, without_x, 4, [](FileWriter& file) {
    const std::vector<double> x(30);
    file.dataset("x", H5T_IEEE_F64LE, {2, 3, 5}, x.data());
  });
  CHECK_THAT(refusal_of(path), test::contains_text("/x holds 64-bit float values"));
}

TEST_CASE("values that are not finite, or overflow the dtype, are named where they are") {
  const TemporaryFolder folder;
  const std::string path = folder / "layer.h5";
  Shapes rest = shapes();
  rest.erase("x");
  rest.erase("wo");
  std::vector<float> x = numbers({2, 3, 5});
  std::vector<float> wo = numbers({5, 8});
  x[22] = 1e6F;
  wo[9] = HUGE_VALF;
  write_layer(path, rest, 4, [&](FileWriter& file) {
    file.dataset("x", H5T_IEEE_F32LE, {2, 3, 5}, x.data());
    file.dataset("wo", H5T_IEEE_F32LE, {5, 8}, wo.data());
  });
  const auto source = open_layer_input(path, std::nullopt);
  std::vector<float> rows(15);

  source->read(Activation::x, 1, 0, 3, DType::fp32, rows.data());
  CHECK(rows[7] == 1e6F);
  CHECK_THROWS_WITH(source->read(Activation::x, 1, 0, 3, DType::fp16, rows.data()),
                    test::contains_text("/x[1, 1, 2] is 1000000, which overflows fp16"));
  CHECK_THROWS_WITH(source->weights(Weight::wo), test::contains_text("/wo[1, 1] is inf; every value must be finite"));
}

TEST_CASE("weights that the layer does not ask for are refused, not ignored") {
  const TemporaryFolder folder;
  const std::string path = folder / "layer.h5";
  const auto source_with = [&](const std::string& name, const std::vector<hsize_t>& extents) {
    Shapes all = shapes();
    all[name] = extents;
    write_layer(path, all);
    return open_layer_input(path, std::nullopt);
  };
  const Layer none;
  CHECK_THROWS_WITH(require_weights(*source_with("q_norm_weight", {8}), none),
                    test::contains_text("/q_norm_weight, and --layer.qk-norm is none"));
  CHECK_THROWS_WITH(require_weights(*source_with("o_norm_bias", {8}), none), test::contains_text("--layer.output-norm is none"));
  CHECK_THROWS_WITH(require_weights(*source_with("wg", {8, 5}), none), test::contains_text("/wg, and --layer.gate is none"));
  Layer rms;
  rms.qk_norm = Norm::rms;
  CHECK_THROWS_WITH(require_weights(*source_with("k_norm_bias", {2}), rms), test::contains_text("rms has no bias"));
  Layer gated;
  gated.gate = Gate::relu;
  CHECK_THROWS_WITH(require_weights(*source_with("bq", {8}), gated), test::contains_text("--layer.gate relu needs /wg"));
  require_weights(*source_with("bq", {8}), none);
}

TEST_CASE("generated rows and weights depend on seed and dataset, and not on who reads them") {
  Problem problem{2, 9, 2, 1, 6, DType::fp32, false, 1.0};
  Layer layer;
  layer.bias = true;
  layer.kdim = 5;
  const auto source = make_layer_generator(problem, layer, 3);
  std::vector<float> all(9 * 12);
  source->read(Activation::x, 1, 0, 9, DType::fp32, all.data());
  std::vector<float> some(2 * 12);
  make_layer_generator(problem, layer, 3, 4)->read(Activation::x, 1, 4, 2, DType::fp32, some.data());

  CHECK(std::equal(some.begin(), some.end(), all.begin() + 4 * 12));
  CHECK((source->extents(Weight::wk) == std::vector<std::int64_t>{6, 5} && source->has(Activation::x_key) &&
         !source->has(Activation::x_value)));
  CHECK(source->weights(Weight::wq) != source->weights(Weight::wo));
  CHECK(source->weights(Weight::bk) != source->weights(Weight::bv));
  CHECK(make_layer_generator(problem, layer, 4)->weights(Weight::wq) != source->weights(Weight::wq));
}
