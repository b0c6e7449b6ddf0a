// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/result_contents.hpp>

#include <annulus/core/error.hpp>

#include "hdf5_read.hpp"
#include "hdf5_types.hpp"

#include <algorithm>

namespace annulus {

namespace {

ResultContents::Dataset describe(const std::string& what, const std::string& name, hid_t dataset) {
  const Hdf5Handle type(check_h5(H5Dget_type(dataset), "H5Dget_type"));
  const Hdf5Handle space(check_h5(H5Dget_space(dataset), "H5Dget_space"));
  const int axes = H5Sget_simple_extent_ndims(space.get());
  std::vector<hsize_t> extents(static_cast<std::size_t>(std::max(0, axes)));
  if (axes < 0 || H5Sget_simple_extent_dims(space.get(), extents.data(), nullptr) < 0) { refuse_unreadable(what); }
  const std::optional<FileDType> known = recognise_dtype(type.get());
  return {name, {extents.begin(), extents.end()}, known ? std::string(to_string(known->dtype)) : describe_hdf5_type(type.get())};
}

}  // namespace

ResultContents read_result_contents(const std::string& path) {
  const std::string what = fmt::format("result file '{}'", path);
  const Hdf5Lock lock;
  const ReadableFile file(what, path);
  ResultContents contents;
  bool in_parts = false;
  for (const std::string& name : names_in(file, what, "/")) {
    in_parts = in_parts || name == "parts";
    const Hdf5Handle object(H5Oopen(file.get(), name.c_str(), H5P_DEFAULT));
    if (!object) { refuse_unreadable(what); }
    if (H5Iget_type(object.get()) == H5I_DATASET) { contents.datasets.push_back(describe(what, "/" + name, object.get())); }
  }
  contents.provenance = read_texts(file, what, "/provenance");
  if (!in_parts) { return contents; }
  for (ReadColumn& read : read_columns(file, what, "/parts")) {
    if (read.extents.size() == 1) { contents.parts.push_back(std::move(read.column)); }
  }
  return contents;
}

}  // namespace annulus
