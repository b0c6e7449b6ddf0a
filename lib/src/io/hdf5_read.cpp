// SPDX-License-Identifier: Apache-2.0
#include "hdf5_read.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cstddef>
#include <utility>

namespace annulus {

namespace {

/// All elements of a dataset in the type that it has in memory. @throws InvalidArgument if the file is damaged
void read_all(const std::string& what, hid_t dataset, hid_t type, void* elements) {
  if (H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, elements) < 0) { refuse_unreadable(what); }
}

std::vector<std::string> split_strings(const std::string& elements, std::size_t width) {
  std::vector<std::string> texts;
  for (std::size_t begin = 0; begin < elements.size(); begin += width) {
    const std::string text = elements.substr(begin, width);
    texts.push_back(text.substr(0, text.find('\0')));
  }
  return texts;
}

}  // namespace

std::vector<std::string> names_in(const ReadableFile& file, const std::string& what, const std::string& folder) {
  H5G_info_t info{};
  ANNULUS_EXPECTS(H5Gget_info_by_name(file.get(), folder.c_str(), &info, H5P_DEFAULT) >= 0, "{} has no {}", what, folder);
  std::vector<std::string> names;
  for (hsize_t number = 0; number < info.nlinks; ++number) {
    const auto link = [&](char* text, std::size_t bytes) {
      const ssize_t length = H5Lget_name_by_idx(file.get(), folder.c_str(), H5_INDEX_NAME, H5_ITER_INC, number, text, bytes, H5P_DEFAULT);
      return static_cast<std::size_t>(check_h5(length, "H5Lget_name_by_idx"));
    };
    std::string name(link(nullptr, 0), '\0');
    link(name.data(), name.size() + 1);
    names.push_back(std::move(name));
  }
  return names;
}

ReadColumn read_column(const ReadableFile& file, const std::string& what, const std::string& folder, const std::string& name) {
  return read_column(file.get(), file.state().bytes, what, folder + "/" + name);
}

ReadColumn read_column(hid_t file, std::int64_t file_bytes, const std::string& what, const std::string& path) {
  const Hdf5Handle dataset(H5Dopen2(file, path.c_str(), H5P_DEFAULT));
  ANNULUS_EXPECTS(static_cast<bool>(dataset), "{} has no {}", what, path);
  const Hdf5Handle type(check_h5(H5Dget_type(dataset.get()), "H5Dget_type"));
  const Hdf5Handle space(check_h5(H5Dget_space(dataset.get()), "H5Dget_space"));
  const std::string named = fmt::format("{}: {}", what, path);
  std::vector<hsize_t> extents(static_cast<std::size_t>(check_h5(H5Sget_simple_extent_ndims(space.get()), "H5Sget_simple_extent_ndims")));
  check_h5(H5Sget_simple_extent_dims(space.get(), extents.data(), nullptr), "H5Sget_simple_extent_dims");
  const std::size_t width = H5Tget_size(type.get());
  const hssize_t elements = H5Sget_simple_extent_npoints(space.get());
  // A damaged header is not asked for memory that the file cannot fill.
  ANNULUS_EXPECTS(width > 0 && elements >= 0 && std::cmp_less_equal(elements, static_cast<std::size_t>(file_bytes) / width),
                  "{} is longer than the file", named);
  const auto count = static_cast<std::size_t>(elements);
  ReadColumn read{{path.substr(path.rfind('/') + 1), {}}, {extents.begin(), extents.end()}};
  if (H5Tequal(type.get(), H5T_STD_I64LE) > 0) {
    std::vector<std::int64_t> values(count);
    read_all(named, dataset.get(), H5T_NATIVE_INT64, values.data());
    read.column.values = std::move(values);
  } else if (H5Tequal(type.get(), H5T_IEEE_F64LE) > 0) {
    std::vector<double> values(count);
    read_all(named, dataset.get(), H5T_NATIVE_DOUBLE, values.data());
    read.column.values = std::move(values);
  } else {
    ANNULUS_EXPECTS(H5Tget_class(type.get()) == H5T_STRING && H5Tis_variable_str(type.get()) == 0,
                    "{} holds neither int64 nor fp64 nor strings of one length", named);
    std::string letters(count * width, '\0');
    read_all(named, dataset.get(), type.get(), letters.data());
    read.column.values = split_strings(letters, width);
  }
  return read;
}

std::vector<ReadColumn> read_columns(const ReadableFile& file, const std::string& what, const std::string& folder) {
  std::vector<ReadColumn> columns;
  for (const std::string& name : names_in(file, what, folder)) { columns.push_back(read_column(file, what, folder, name)); }
  return columns;
}

std::vector<std::pair<std::string, std::string>> read_texts(const ReadableFile& file, const std::string& what, const std::string& folder) {
  std::vector<std::pair<std::string, std::string>> found;
  for (ReadColumn& read : read_columns(file, what, folder)) {
    auto* const texts = std::get_if<std::vector<std::string>>(&read.column.values);
    ANNULUS_EXPECTS(texts != nullptr && texts->size() == 1, "{}: {}/{} is no text", what, folder, read.column.name);
    found.emplace_back(std::move(read.column.name), std::move(texts->front()));
  }
  return found;
}

}  // namespace annulus
