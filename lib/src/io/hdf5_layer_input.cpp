// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/io/layer_source.hpp>
#include <annulus/pattern/progression.hpp>

#include "float_dataset.hpp"
#include "hdf5_input.hpp"
#include "hdf5_open.hpp"
#include "hdf5_sample.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <utility>

namespace annulus {

namespace {

/// One integer of any width and sign.
std::optional<std::int64_t> read_integer_attribute(hid_t attribute) {
  const Hdf5Handle type(check_h5(H5Aget_type(attribute), "H5Aget_type"));
  const Hdf5Handle space(check_h5(H5Aget_space(attribute), "H5Aget_space"));
  if (H5Tget_class(type.get()) != H5T_INTEGER || H5Sget_simple_extent_npoints(space.get()) != 1) { return std::nullopt; }
  std::int64_t value = 0;
  check_h5(H5Aread(attribute, H5T_NATIVE_INT64, &value), "H5Aread");
  return value;
}

/// One string of fixed or variable length.
std::optional<std::string> read_string_attribute(hid_t attribute) {
  const Hdf5Handle type(check_h5(H5Aget_type(attribute), "H5Aget_type"));
  const Hdf5Handle space(check_h5(H5Aget_space(attribute), "H5Aget_space"));
  if (H5Tget_class(type.get()) != H5T_STRING || H5Sget_simple_extent_npoints(space.get()) != 1) { return std::nullopt; }
  if (H5Tis_variable_str(type.get()) > 0) {
    char* text = nullptr;
    check_h5(H5Aread(attribute, type.get(), static_cast<void*>(&text)), "H5Aread");
    std::string copy = text == nullptr ? "" : text;
    check_h5(H5free_memory(text), "H5free_memory");
    return copy;
  }
  std::string text(H5Tget_size(type.get()), '\0');
  check_h5(H5Aread(attribute, type.get(), text.data()), "H5Aread");
  text.resize(std::min(text.find('\0'), text.size()));
  while (text.ends_with(' ')) { text.pop_back(); }
  return text;
}

/// An open dataset of the layer.
struct LayerDataset {
  FloatDataset input;
  std::string name;             ///< "/x"
  std::int64_t chunk_rows = 1;  ///< that are decoded together
};

class Hdf5LayerInput final : public LayerSource {
 public:
  Hdf5LayerInput(const std::string& path, std::optional<std::int64_t> heads, const std::function<void()>& progress)
      : path_(path), files_(progress) {
    const Hdf5Lock lock;
    file_ = files_.open(fmt::format("input file '{}'", path), path);
    for (const auto& [which, name] : EnumNames<Activation>::values) { open(std::string(name), activations_[which]); }
    for (const auto& [which, name] : EnumNames<Weight>::values) { open(std::string(name), weights_[which]); }
    for (const char* name : {"/x", "/wq", "/wk", "/wv", "/wo"}) {
      ANNULUS_EXPECTS(find(name) != nullptr,
                      "input file '{}' has no dataset {}; a layer needs /x [batch, seq, embed], /wq [heads * head_dim, embed], "
                      "/wk, /wv [kv_heads * head_dim, embed] and /wo [embed, heads * head_dim]",
                      path, name);
    }
    read_extents(heads);
    read_rotary();
  }

  const Problem& problem() const override { return problem_; }
  const Layer& layer() const override { return layer_; }
  std::string describe() const override { return fmt::format("file {}", path_); }
  std::vector<std::string> files() const override { return files_.paths(); }
  std::string identity() const override { return file_instances(files_.paths()); }

  std::vector<Fingerprint> fingerprints(std::int64_t part, std::int64_t parts) const override {
    std::vector<Fingerprint> all;
    for_each([&](const LayerDataset& dataset) {
      const FloatDataset& input = dataset.input;
      const auto row = static_cast<std::int64_t>(input.extents.back());
      all.push_back(
          {fmt::format("values of {}", dataset.name), sample_fingerprint(*input.reader, input.dtype, input.extents, row, part, parts)});
    });
    return all;
  }

  bool has(Activation which) const override { return activations_.at(which).has_value(); }
  std::vector<std::int64_t> extents(Weight which) const override {
    const std::optional<LayerDataset>& dataset = weights_.at(which);
    if (!dataset) { return {}; }
    return {dataset->input.extents.begin(), dataset->input.extents.end()};
  }

  void read(Activation which, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    const LayerDataset& dataset = *activations_.at(which);
    ANNULUS_EXPECTS(batch >= 0 && batch < problem_.batch && first >= 0 && count >= 0 && count <= problem_.seq_len - first,
                    "rows {}..{} of batch entry {} are outside {} of {}", first, first + count, batch, dataset.name, describe());
    const std::int64_t features = features_of(layer_, which);
    const std::int64_t stored_bytes = features * size_of(dataset.input.dtype.dtype);
    const std::int64_t most = std::max({std::int64_t{1}, kReadBytes / stored_bytes, dataset.chunk_rows});
    std::vector<std::byte> stored(static_cast<std::size_t>(std::min(most, count) * stored_bytes));
    for (std::int64_t done = 0, rows = 0; done < count; done += rows) {
      rows = std::min(most, count - done);
      // To the end of a chunk, so that the next part decodes other chunks.
      const std::int64_t rest = (first + done + rows) % dataset.chunk_rows;
      if (rows > rest && done + rows < count) { rows -= rest; }
      std::vector<hsize_t> start{static_cast<hsize_t>(first + done), 0};
      std::vector<hsize_t> extent{static_cast<hsize_t>(rows), static_cast<hsize_t>(features)};
      if (dataset.input.extents.size() == 3) {
        start.insert(start.begin(), static_cast<hsize_t>(batch));
        extent.insert(extent.begin(), 1);
      }
      read_values(dataset, start, extent, stored.data());
      convert_values(dataset.input, path_, dataset.name, start, stored.data(), rows * features, dtype,
                     static_cast<std::byte*>(out) + done * features * size_of(dtype));
    }
  }

  /// Reads `bytes` of values, spread over the datasets.
  void read_samples(std::int64_t bytes) const {
    std::int64_t datasets_left = 0;
    for_each([&](const LayerDataset& /*dataset*/) { ++datasets_left; });
    for_each([&](const LayerDataset& dataset) { bytes -= sample(dataset, bytes / datasets_left--); });
  }

  std::vector<float> weights(Weight which) const override {
    const LayerDataset& dataset = *weights_.at(which);
    const std::vector<hsize_t>& extents = dataset.input.extents;
    const std::int64_t count = elements(which);
    std::vector<std::byte> stored(static_cast<std::size_t>(count * size_of(dataset.input.dtype.dtype)));
    const std::vector<hsize_t> start(extents.size(), 0);
    read_values(dataset, start, extents, stored.data());
    std::vector<float> values(static_cast<std::size_t>(count));
    convert_values(dataset.input, path_, dataset.name, start, stored.data(), count, DType::fp32, values.data());
    return values;
  }

 private:
  void open(const std::string& name, std::optional<LayerDataset>& dataset) {
    files_.step();
    std::optional<FloatDataset> input = open_float_dataset(file_, path_, name, files_);
    if (!input) { return; }
    dataset.emplace();
    dataset->input = std::move(*input);
    dataset->name = name;
    make_readable(dataset->input, path_, name, files_);
    const std::optional<DecodedUnit> unit = dataset->input.reader->decoded_unit();
    if (!unit || unit->extents.size() < 2) { return; }
    const std::size_t axis = unit->extents.size() - 2;
    dataset->chunk_rows = static_cast<std::int64_t>(std::min(unit->extents[axis], dataset->input.extents[axis]));
  }

  template <class Visit>
  void for_each(const Visit& visit) const {
    for (const auto& [which, dataset] : activations_) {
      if (dataset) { visit(*dataset); }
    }
    for (const auto& [which, dataset] : weights_) {
      if (dataset) { visit(*dataset); }
    }
  }
  const LayerDataset* find(std::string_view name) const {
    const LayerDataset* found = nullptr;
    for_each([&](const LayerDataset& dataset) {
      if (dataset.name == name) { found = &dataset; }
    });
    return found;
  }

  void require_extents(std::string_view name, const std::vector<std::int64_t>& expected, const std::string& axes) const {
    const LayerDataset* dataset = find(name);
    if (dataset == nullptr) { return; }
    std::vector<hsize_t> wanted(expected.begin(), expected.end());
    ANNULUS_EXPECTS(dataset->input.extents == wanted, "input file '{}': {} is {}; {} must be {}", path_, name,
                    shape_text(dataset->input.extents), axes, shape_text(wanted));
  }

  /// [features] or [head_dim].
  void require_norm(std::string_view name, std::int64_t features) const {
    const LayerDataset* dataset = find(name);
    if (dataset == nullptr) { return; }
    const std::vector<hsize_t>& extents = dataset->input.extents;
    const bool fits =
        extents.size() == 1 && (extents[0] == static_cast<hsize_t>(features) || extents[0] == static_cast<hsize_t>(problem_.head_dim));
    ANNULUS_EXPECTS(fits, "input file '{}': {} is {}; it must be [{}] for rows or [{}] for heads", path_, name, shape_text(extents),
                    features, problem_.head_dim);
  }

  void read_extents(std::optional<std::int64_t> asked_heads) {
    const std::vector<hsize_t>& x = find("/x")->input.extents;
    ANNULUS_EXPECTS(x.size() == 2 || x.size() == 3,
                    "input file '{}': /x has {} dimensions; allowed are [batch, seq, embed] and, for one batch entry, [seq, embed]", path_,
                    x.size());
    problem_.batch = x.size() == 3 ? static_cast<std::int64_t>(x[0]) : 1;
    problem_.seq_len = static_cast<std::int64_t>(x[x.size() - 2]);
    problem_.dtype = find("/x")->input.dtype.dtype;
    layer_.embed = static_cast<std::int64_t>(x.back());
    layer_.kdim = layer_.vdim = layer_.embed;
    for (const Activation which : {Activation::x_key, Activation::x_value}) {
      if (!has(which)) { continue; }
      const LayerDataset& other = *activations_.at(which);
      std::vector<hsize_t> same = other.input.extents;
      if (same.size() == x.size()) { same.back() = x.back(); }
      ANNULUS_EXPECTS(same == x, "input file '{}': /x is {} but {} is {}; they may differ in their last extent only", path_, shape_text(x),
                      other.name, shape_text(other.input.extents));
      ANNULUS_EXPECTS(other.input.dtype.dtype == problem_.dtype, "input file '{}': /x is {} but {} is {}; all must have one dtype", path_,
                      to_string(problem_.dtype), other.name, to_string(other.input.dtype.dtype));
      (which == Activation::x_key ? layer_.kdim : layer_.vdim) = static_cast<std::int64_t>(other.input.extents.back());
    }

    const std::vector<std::int64_t> wq = extents(Weight::wq);
    const std::vector<std::int64_t> wk = extents(Weight::wk);
    ANNULUS_EXPECTS(wq.size() == 2 && wk.size() == 2, "input file '{}': /wq has {} dimensions and /wk {}; both are matrices", path_,
                    wq.size(), wk.size());
    const Hdf5Handle attribute = open_attribute(file_->get(), "heads");
    std::optional<std::int64_t> heads;
    if (attribute) {
      heads = read_integer_attribute(attribute.get());
      ANNULUS_EXPECTS(heads.has_value(), "input file '{}': attribute heads is not one integer", path_);
      ANNULUS_EXPECTS(!asked_heads || asked_heads == heads, "--heads {} contradicts the input file {}, which has {}", *asked_heads, path_,
                      *heads);
    } else {
      heads = asked_heads;
    }
    ANNULUS_EXPECTS(heads.has_value(), "input file '{}' has no attribute heads, and --heads is not given: /wq alone does not tell", path_);
    ANNULUS_EXPECTS(*heads >= 1 && wq[0] % *heads == 0, "input file '{}': /wq is {}, whose {} rows are not those of {} heads", path_,
                    shape_text(find("/wq")->input.extents), wq[0], *heads);
    problem_.heads = *heads;
    problem_.head_dim = wq[0] / *heads;
    ANNULUS_EXPECTS(wk[0] % problem_.head_dim == 0, "input file '{}': /wk is {}, whose {} rows are not those of heads of {}", path_,
                    shape_text(find("/wk")->input.extents), wk[0], problem_.head_dim);
    problem_.kv_heads = wk[0] / problem_.head_dim;
    problem_.causal = false;
    problem_.scale = read_scale(file_->get(), path_, problem_.head_dim);
    require_valid(problem_, path_);
    problem_.kv_lengths = read_kv_lengths(file_, path_, problem_.batch, files_);
    require_valid(problem_, path_);

    const std::int64_t q = q_features(problem_);
    const std::int64_t kv = kv_features(problem_);
    require_extents("/wq", {q, layer_.embed}, "[heads * head_dim, embed]");
    require_extents("/wk", {kv, layer_.kdim}, "[kv_heads * head_dim, kdim]");
    require_extents("/wv", {kv, layer_.vdim}, "[kv_heads * head_dim, vdim]");
    require_extents("/wo", {layer_.embed, q}, "[embed, heads * head_dim]");
    require_extents("/wg", {q, layer_.embed}, "[heads * head_dim, embed]");
    require_extents("/bq", {q}, "[heads * head_dim]");
    require_extents("/bk", {kv}, "[kv_heads * head_dim]");
    require_extents("/bv", {kv}, "[kv_heads * head_dim]");
    require_extents("/bo", {layer_.embed}, "[embed]");
    require_extents("/bg", {q}, "[heads * head_dim]");
    for (const char* name : {"/bias_k", "/bias_v"}) { require_extents(name, {kv}, "[kv_heads * head_dim]"); }
    layer_.bias_kv = weights_.at(Weight::bias_k).has_value();
    ANNULUS_EXPECTS(layer_.bias_kv == weights_.at(Weight::bias_v).has_value(), "input file '{}' has {} without {}", path_,
                    layer_.bias_kv ? "/bias_k" : "/bias_v", layer_.bias_kv ? "/bias_v" : "/bias_k");
    for (const char* name : {"/q_norm_weight", "/q_norm_bias", "/o_norm_weight", "/o_norm_bias"}) { require_norm(name, q); }
    for (const char* name : {"/k_norm_weight", "/k_norm_bias"}) { require_norm(name, kv); }
    for (const char* name : {"q", "k", "o"}) {
      const LayerDataset* weight = find(fmt::format("/{}_norm_weight", name));
      const LayerDataset* bias = find(fmt::format("/{}_norm_bias", name));
      ANNULUS_EXPECTS(weight == nullptr || bias == nullptr || weight->input.extents == bias->input.extents,
                      "input file '{}': {} and {} are of different lengths", path_, weight->name, bias->name);
    }
    for (const Weight which : {Weight::bq, Weight::bk, Weight::bv, Weight::bo}) {
      layer_.bias = layer_.bias || weights_.at(which).has_value();
    }
  }

  void read_rotary() {
    if (const Hdf5Handle pairs = open_attribute(file_->get(), "rope_pairs")) {
      const std::optional<std::string> name = read_string_attribute(pairs.get());
      const std::optional<RotaryPairs> rotary = name ? from_string<RotaryPairs>(*name) : std::nullopt;
      ANNULUS_EXPECTS(rotary.has_value(), "input file '{}': attribute rope_pairs is not one of {}", path_, names_of<RotaryPairs>());
      layer_.rotary = *rotary;
    }
    if (const Hdf5Handle base = open_attribute(file_->get(), "rope_base")) {
      const std::optional<double> value = read_float_attribute(base.get());
      ANNULUS_EXPECTS(value.has_value() && std::isfinite(*value) && *value > 0,
                      "input file '{}': attribute rope_base is not one positive float", path_);
      layer_.rotary_base = *value;
    }
  }

  /// Reads up to `share` bytes of a dataset, in units of some rows or of the chunks that hold them, from its first to its last. Returns the
  /// bytes.
  std::int64_t sample(const LayerDataset& dataset, std::int64_t share) const {
    constexpr std::int64_t kUnitBytes = std::int64_t{1} << 18;
    std::vector<hsize_t> extent = dataset.input.extents;
    const std::size_t axis = extent.size() < 2 ? 0 : extent.size() - 2;
    const auto rows = static_cast<std::int64_t>(extent[axis]);
    const std::int64_t batches = extent.size() == 3 ? static_cast<std::int64_t>(extent[0]) : 1;
    const std::int64_t row_bytes =
        (axis == 0 && extent.size() == 1 ? 1 : static_cast<std::int64_t>(extent.back())) * size_of(dataset.input.dtype.dtype);
    const std::int64_t unit = std::clamp<std::int64_t>(ceil_div(kUnitBytes / row_bytes, dataset.chunk_rows) * dataset.chunk_rows, 1, rows);
    const std::int64_t units = ceil_div(rows, unit) * batches;
    const std::int64_t wanted = std::clamp<std::int64_t>(share / (unit * row_bytes), 1, units);
    std::vector<std::byte> scratch(static_cast<std::size_t>(unit * row_bytes));
    for (std::int64_t index = 0; index < wanted; ++index) {
      const std::int64_t place = wanted == 1 ? 0 : index * (units - 1) / (wanted - 1);
      std::vector<hsize_t> start(extent.size(), 0);
      const std::int64_t first = place % ceil_div(rows, unit) * unit;
      start[axis] = static_cast<hsize_t>(first);
      extent[axis] = static_cast<hsize_t>(std::min(unit, rows - first));
      if (extent.size() == 3) {
        start[0] = static_cast<hsize_t>(place / ceil_div(rows, unit));
        extent[0] = 1;
      }
      read_values(dataset, start, extent, scratch.data());
      files_.step();
    }
    return wanted * unit * row_bytes;
  }

  static void read_values(const LayerDataset& dataset, const std::vector<hsize_t>& start, const std::vector<hsize_t>& extent, void* out) {
    const Hdf5Lock lock;
    const SlabCopy box = box_in_order(start, extent);
    dataset.input.reader->read(std::span(&box, 1), out);
  }

  std::string path_;
  SourceFiles files_;
  std::shared_ptr<const ReadableFile> file_;                       ///< stays locked
  std::map<Activation, std::optional<LayerDataset>> activations_;  ///< closed before the files
  std::map<Weight, std::optional<LayerDataset>> weights_;
  Problem problem_;
  Layer layer_;
};

}  // namespace

void read_layer_samples(const std::string& path, std::optional<std::int64_t> heads, std::int64_t bytes,
                        const std::function<void()>& progress) {
  Hdf5LayerInput(path, heads, progress).read_samples(bytes);
}

std::unique_ptr<LayerSource> open_layer_input(const std::string& path, std::optional<std::int64_t> heads) {
  return std::make_unique<Hdf5LayerInput>(path, heads, std::function<void()>());
}

}  // namespace annulus
