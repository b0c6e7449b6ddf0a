// SPDX-License-Identifier: Apache-2.0
#include "hdf5_write.hpp"

#include <annulus/core/error.hpp>

#include "complete_dataset.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <type_traits>
#include <variant>

namespace annulus {

namespace {

Hdf5Handle make_space(const Extents& extents) {
  return Hdf5Handle(check_h5(H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr), "H5Screate_simple"));
}

/// Groups on the way to a dataset are made with it.
Hdf5Handle make_links() {
  Hdf5Handle links(check_h5(H5Pcreate(H5P_LINK_CREATE), "H5Pcreate"));
  check_h5(H5Pset_create_intermediate_group(links.get(), 1), "H5Pset_create_intermediate_group");
  return links;
}

/// A UTF-8 string of at most `bytes` bytes, zero terminated.
Hdf5Handle make_string_type(std::size_t bytes) {
  Hdf5Handle type(check_h5(H5Tcopy(H5T_C_S1), "H5Tcopy"));
  check_h5(H5Tset_size(type.get(), bytes + 1), "H5Tset_size");
  check_h5(H5Tset_cset(type.get(), H5T_CSET_UTF8), "H5Tset_cset");
  return type;
}

void write_values(const Hdf5File& file, const std::string& name, const Extents& extents, const std::vector<std::int64_t>& values) {
  write_dataset(file, name, H5T_STD_I64LE, extents, values.data());
}
void write_values(const Hdf5File& file, const std::string& name, const Extents& extents, const std::vector<double>& values) {
  write_dataset(file, name, H5T_IEEE_F64LE, extents, values.data());
}
/// Strings one after another, each in `bytes` bytes, of which the last one is zero.
std::string elements_of(const std::vector<std::string>& values, std::size_t bytes) {
  std::string elements(values.size() * bytes, '\0');
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t length = std::min(values[i].size(), bytes - 1);
    elements.replace(i * bytes, length, values[i], 0, length);
  }
  return elements;
}

/// Strings of the longest one's length.
void write_values(const Hdf5File& file, const std::string& name, const Extents& extents, const std::vector<std::string>& values) {
  std::size_t longest = 0;
  for (const std::string& text : values) { longest = std::max(longest, text.size()); }
  write_dataset(file, name, make_string_type(longest).get(), extents, elements_of(values, longest + 1).data());
}

/// A dataset of an open file, with its type and extents.
struct OpenColumn {
  OpenColumn(hid_t file, const std::string& what, const std::string& name) : dataset(H5Dopen2(file, name.c_str(), H5P_DEFAULT)) {
    ANNULUS_EXPECTS(dataset, "{}: there is no {}", what, name);
    type = Hdf5Handle(check_h5(H5Dget_type(dataset.get()), "H5Dget_type"));
    extents = extents_of(dataset.get());
  }

  /// Of extents from this one on.
  std::size_t elements(std::size_t from) const {
    return std::accumulate(extents.begin() + static_cast<std::ptrdiff_t>(from), extents.end(), std::size_t{1}, std::multiplies<>());
  }
  std::size_t element_bytes() const { return H5Tget_size(type.get()); }
  H5T_class_t type_class() const { return H5Tget_class(type.get()); }

  Hdf5Handle dataset;
  Hdf5Handle type;
  Extents extents;
};

constexpr H5T_class_t class_of(const std::vector<std::int64_t>& /*values*/) { return H5T_INTEGER; }
constexpr H5T_class_t class_of(const std::vector<double>& /*values*/) { return H5T_FLOAT; }
constexpr H5T_class_t class_of(const std::vector<std::string>& /*values*/) { return H5T_STRING; }

}  // namespace

Hdf5Handle create_dataset(hid_t file, const std::string& name, hid_t type, const Extents& extents) {
  const Hdf5Handle creation(check_h5(H5Pcreate(H5P_DATASET_CREATE), "H5Pcreate"));
  check_h5(H5Pset_layout(creation.get(), H5D_CONTIGUOUS), "H5Pset_layout");
  check_h5(H5Pset_alloc_time(creation.get(), H5D_ALLOC_TIME_EARLY), "H5Pset_alloc_time");
  check_h5(H5Pset_fill_time(creation.get(), H5D_FILL_TIME_NEVER), "H5Pset_fill_time");
  const Hdf5Handle links = make_links();
  const Hdf5Handle space = make_space(extents);
  return Hdf5Handle(check_h5(H5Dcreate2(file, name.c_str(), type, space.get(), links.get(), creation.get(), H5P_DEFAULT), "H5Dcreate2"));
}

void write_block(const Hdf5File& file, const Hdf5Handle& dataset, hid_t type, const Extents& start, const Extents& extent,
                 const void* elements) {
  const Hdf5Handle space(check_h5(H5Dget_space(dataset.get()), "H5Dget_space"));
  if (!extent.empty()) {
    check_h5(H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, start.data(), nullptr, extent.data(), nullptr), "H5Sselect_hyperslab");
  }
  const Hdf5Handle memory = make_space(extent);
  if (H5Dwrite(dataset.get(), type, memory.get(), space.get(), H5P_DEFAULT, elements) < 0) {
    throw RuntimeFailure(fmt::format("{} cannot be written: {}", file.describe(), innermost_hdf5_error()));
  }
}

void close_dataset(const Hdf5File& file, Hdf5Handle& dataset) {
  if (H5Dclose(dataset.release()) < 0) {
    throw RuntimeFailure(fmt::format("{} cannot be written: {}", file.describe(), innermost_hdf5_error()));
  }
}

void write_dataset(const Hdf5File& file, const std::string& name, hid_t type, const Extents& extents, const void* elements) {
  Hdf5Handle dataset = create_dataset(file.get(), name, type, extents);
  const bool empty = std::find(extents.begin(), extents.end(), hsize_t{0}) != extents.end();
  if (!empty && H5Dwrite(dataset.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, elements) < 0) {
    throw RuntimeFailure(fmt::format("{} cannot be written: {}", file.describe(), innermost_hdf5_error()));
  }
  close_dataset(file, dataset);
}

void write_string(const Hdf5File& file, const std::string& name, const std::string& text) {
  write_dataset(file, name, make_string_type(text.size()).get(), {}, text.c_str());
}

namespace {

/// Writes `values` to dataset[start .. start + extent), which must be as many.
void write_part(const Hdf5File& file, const std::string& name, const OpenColumn& column, const Extents& start, const Extents& extent,
                const ColumnValues& values) {
  const std::size_t count = std::accumulate(extent.begin(), extent.end(), std::size_t{1}, std::multiplies<>());
  std::visit(
      [&](const auto& some) {
        ANNULUS_EXPECTS(some.size() == count && class_of(some) == column.type_class(), "{}: {} takes {} values of its type, not these {}",
                        file.describe(), name, count, some.size());
        if (some.empty()) { return; }
        if constexpr (std::is_same_v<decltype(some), const std::vector<std::string>&>) {
          write_block(file, column.dataset, column.type.get(), start, extent, elements_of(some, column.element_bytes()).data());
        } else {
          write_block(file, column.dataset, column.type.get(), start, extent, some.data());
        }
      },
      values);
}

}  // namespace

void write_row(const Hdf5File& file, const std::string& name, std::int64_t index, const ColumnValues& values) {
  const OpenColumn column(file.get(), file.describe(), name);
  ANNULUS_EXPECTS(!column.extents.empty(), "{}: {} has no rows", file.describe(), name);
  Extents start(column.extents.size());
  Extents extent = column.extents;
  start.front() = static_cast<hsize_t>(index);
  extent.front() = 1;
  write_part(file, name, column, start, extent, values);
}

void write_again(const Hdf5File& file, const std::string& name, const ColumnValues& values) {
  const OpenColumn column(file.get(), file.describe(), name);
  write_part(file, name, column, Extents(column.extents.size()), column.extents, values);
}

void write_columns(const Hdf5File& file, const std::string& folder, const Extents& extents, std::span<const NamedColumn> columns) {
  const hsize_t count = std::accumulate(extents.begin(), extents.end(), hsize_t{1}, std::multiplies<>());
  for (const NamedColumn& column : columns) {
    std::visit(
        [&](const auto& values) {
          ANNULUS_EXPECTS(values.size() == count, "column {} has {} values for extents {}", column.name, values.size(),
                          fmt::join(extents, " x "));
          write_values(file, folder + "/" + column.name, extents, values);
        },
        column.values);
  }
}

}  // namespace annulus
