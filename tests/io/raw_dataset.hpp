// SPDX-License-Identifier: Apache-2.0
// Reading a dataset back with the HDF5 C API alone.
#pragma once

#include <annulus_test.hpp>

#include <hdf5.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace annulus::test {

/// The bytes of a whole dataset, unconverted, with its extents; checks that it is contiguous.
struct RawDataset {
  RawDataset(const std::string& path, const std::string& name) {
    const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
    REQUIRE(file >= 0);
    const hid_t dataset = H5Dopen2(file, name.c_str(), H5P_DEFAULT);
    REQUIRE(dataset >= 0);
    type = H5Dget_type(dataset);
    const hid_t space = H5Dget_space(dataset);
    extents.resize(static_cast<std::size_t>(H5Sget_simple_extent_ndims(space)));
    H5Sget_simple_extent_dims(space, extents.data(), nullptr);
    bytes.resize(static_cast<std::size_t>(H5Sget_simple_extent_npoints(space)) * H5Tget_size(type));
    if (!bytes.empty()) { REQUIRE(H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()) >= 0); }
    const hid_t creation = H5Dget_create_plist(dataset);
    contiguous = H5Pget_layout(creation) == H5D_CONTIGUOUS;
    H5Pclose(creation);
    H5Sclose(space);
    H5Dclose(dataset);
    H5Fclose(file);
  }
  ~RawDataset() { H5Tclose(type); }
  RawDataset(const RawDataset&) = delete;
  RawDataset& operator=(const RawDataset&) = delete;

  template <class Element>
  const Element* as() const {
    return reinterpret_cast<const Element*>(bytes.data());
  }

  hid_t type;
  std::vector<hsize_t> extents;
  std::vector<std::uint8_t> bytes;
  bool contiguous;
};

}  // namespace annulus::test
