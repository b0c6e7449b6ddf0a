// SPDX-License-Identifier: Apache-2.0
#include "float_dataset.hpp"

#include <annulus/core/error.hpp>

#include "element_convert.hpp"

#include <cmath>
#include <cstring>
#include <span>
#include <utility>

namespace annulus {

std::optional<FloatDataset> open_float_dataset(const std::shared_ptr<const ReadableFile>& file, const std::string& path,
                                               const std::string& name, SourceFiles& files) {
  FloatDataset input;
  input.opened = open_dataset(fmt::format("input file '{}': {}", path, name), file, path, name, files);
  if (!input.opened.dataset) { return std::nullopt; }
  const hid_t dataset = input.opened.dataset.get();
  const Hdf5Handle type(check_h5(H5Dget_type(dataset), "H5Dget_type"));
  const auto recognised = recognise_dtype(type.get());
  ANNULUS_EXPECTS(recognised.has_value(), "input file '{}': {} holds {} values; allowed are fp32, fp16 and bf16 (16 bits, 8 of exponent)",
                  path, name, describe_hdf5_type(type.get()));
  input.dtype = *recognised;
  input.extents = extents_of(dataset);
  for (const hsize_t extent : input.extents) {
    ANNULUS_EXPECTS(extent >= 1, "input file '{}': {} is {}; every extent must be at least 1", path, name, shape_text(input.extents));
    ANNULUS_EXPECTS(extent <= hsize_t{1} << 48U, "input file '{}': {} is {}; no extent may be beyond 2^48", path, name,
                    shape_text(input.extents));
  }
  return input;
}

void make_readable(FloatDataset& input, const std::string& path, const std::string& name, SourceFiles& files) {
  const DatasetPlace place{input.opened.dataset.get(), input.opened.file, fmt::format("input file '{}': {}", path, name)};
  require_complete(place, files);
  input.reader = make_box_reader(place, byte_order_of(place.dataset), files);
}

void convert_values(const FloatDataset& input, const std::string& path, const std::string& name, const std::vector<hsize_t>& start,
                    void* stored, std::int64_t count, DType dtype, void* out) {
  const FileDType from = input.dtype;
  if (from.byte_swapped) { swap_bytes(from.dtype, stored, count); }
  const auto refuse_at = [&](std::int64_t index, const std::string& why) {
    std::vector<hsize_t> place = start;
    auto rest = static_cast<hsize_t>(index);
    for (std::size_t axis = place.size(); axis-- > 0;) {
      place[axis] += rest % input.extents[axis];
      rest /= input.extents[axis];
    }
    throw InvalidArgument(
        fmt::format("input file '{}': {}{} is {}{}", path, name, shape_text(place), element_at(from.dtype, stored, index), why));
  };
  if (const auto bad = first_non_finite(from.dtype, stored, count)) { refuse_at(*bad, "; every value must be finite"); }
  if (from.dtype == dtype) {
    if (stored != out) { std::memcpy(out, stored, static_cast<std::size_t>(count * size_of(dtype))); }
    return;
  }
  convert_elements(from.dtype, stored, dtype, out, count);
  if (const auto bad = first_non_finite(dtype, out, count)) { refuse_at(*bad, fmt::format(", which overflows {}", to_string(dtype))); }
}

void require_valid(const Problem& problem, const std::string& path) {
  try {
    validate(problem);
  } catch (const InvalidArgument& error) { throw InvalidArgument(fmt::format("input file '{}': {}", path, error.what())); }
}

Hdf5Handle open_attribute(hid_t file, const char* name) {
  if (check_h5(H5Aexists_by_name(file, "/", name, H5P_DEFAULT), "H5Aexists_by_name") == 0) { return {}; }
  return Hdf5Handle(check_h5(H5Aopen_by_name(file, "/", name, H5P_DEFAULT, H5P_DEFAULT), "H5Aopen_by_name"));
}

double read_scale(hid_t file, const std::string& path, std::int64_t head_dim) {
  const Hdf5Handle attribute = open_attribute(file, "scale");
  if (!attribute) { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }
  const auto scale = read_float_attribute(attribute.get());
  if (!scale) {
    const Hdf5Handle type(check_h5(H5Aget_type(attribute.get()), "H5Aget_type"));
    throw InvalidArgument(
        fmt::format("input file '{}': attribute scale ({}) is not one float of 64, 32 or 16 bits", path, describe_hdf5_type(type.get())));
  }
  ANNULUS_EXPECTS(std::isfinite(*scale), "input file '{}': attribute scale is {}; it must be finite", path, *scale);
  return *scale;
}

std::vector<std::int64_t> read_kv_lengths(const std::shared_ptr<const ReadableFile>& file, const std::string& path, std::int64_t batch,
                                          SourceFiles& files) {
  const std::string what = fmt::format("input file '{}': /kv_lengths", path);
  const OpenedDataset opened = open_dataset(what, file, path, "/kv_lengths", files);
  if (!opened.dataset) { return {}; }
  const hid_t dataset = opened.dataset.get();
  const Hdf5Handle type(check_h5(H5Dget_type(dataset), "H5Dget_type"));
  const bool is_int64 = H5Tequal(type.get(), H5T_STD_I64LE) > 0 || H5Tequal(type.get(), H5T_STD_I64BE) > 0;
  ANNULUS_EXPECTS(is_int64, "{} holds {} values; allowed is int64", what, describe_hdf5_type(type.get()));
  const std::vector<hsize_t> extents = extents_of(dataset);
  ANNULUS_EXPECTS(extents == std::vector<hsize_t>{static_cast<hsize_t>(batch)},
                  "{} is {}; it must be [{}], one number for each batch entry", what, shape_text(extents), batch);
  const DatasetPlace place{dataset, opened.file, what};
  require_complete(place, files);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(batch));
  const SlabCopy all = box_in_order({0}, extents);
  make_box_reader(place, H5Tget_order(H5T_NATIVE_INT64), files)->read(std::span(&all, 1), lengths.data());
  return lengths;
}

}  // namespace annulus
