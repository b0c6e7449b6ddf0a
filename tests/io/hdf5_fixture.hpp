// SPDX-License-Identifier: Apache-2.0
// Files for the tests of lib/io, made and read with the HDF5 C API alone.
#pragma once

#include <annulus_test.hpp>

#include "raw_dataset.hpp"
#include "temporary_folder.hpp"

#include <hdf5.h>

#include <cstdint>
#include <string>
#include <vector>

namespace annulus::test {

/// Whether `type` is a little-endian float with these bits at these places.
inline bool is_float_type(hid_t type, std::size_t bytes, std::size_t exponent_bits, std::size_t mantissa_bits) {
  std::size_t sign = 0;
  std::size_t exponent_at = 0;
  std::size_t exponent = 0;
  std::size_t mantissa_at = 0;
  std::size_t mantissa = 0;
  H5Tget_fields(type, &sign, &exponent_at, &exponent, &mantissa_at, &mantissa);
  return H5Tget_class(type) == H5T_FLOAT && H5Tget_size(type) == bytes && H5Tget_order(type) == H5T_ORDER_LE && exponent == exponent_bits &&
         mantissa == mantissa_bits && mantissa_at == 0 && exponent_at == mantissa_bits && sign == 8 * bytes - 1 &&
         H5Tget_ebias(type) == (std::size_t{1} << (exponent_bits - 1)) - 1;
}

/// A 16-bit float type; closed by the caller.
inline hid_t make_half_type(std::size_t exponent_bits) {
  const hid_t type = H5Tcopy(H5T_IEEE_F32LE);
  H5Tset_fields(type, 15, 15 - exponent_bits, exponent_bits, 0, 15 - exponent_bits);
  H5Tset_size(type, 2);
  H5Tset_ebias(type, (std::size_t{1} << (exponent_bits - 1)) - 1);
  return type;
}

/// An HDF5 file under construction.
class FileWriter {
 public:
  explicit FileWriter(const std::string& path) : file_(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT)) {
    REQUIRE(file_ >= 0);
  }
  ~FileWriter() { H5Fclose(file_); }
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  hid_t get() const { return file_; }

  /// `elements` are in `type`; nullptr leaves them zero.
  void dataset(const std::string& name, hid_t type, const std::vector<hsize_t>& extents, const void* elements = nullptr) {
    const hid_t space = H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr);
    const hid_t dataset = H5Dcreate2(file_, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    REQUIRE(dataset >= 0);
    if (elements != nullptr) { REQUIRE(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, elements) >= 0); }
    H5Dclose(dataset);
    H5Sclose(space);
  }

  void attribute(const std::string& name, hid_t type, const void* value, const std::vector<hsize_t>& extents = {}) {
    const hid_t space =
        extents.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr);
    const hid_t attribute = H5Acreate2(file_, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT);
    REQUIRE(attribute >= 0);
    REQUIRE(H5Awrite(attribute, type, value) >= 0);
    H5Aclose(attribute);
    H5Sclose(space);
  }

 private:
  hid_t file_;
};

}  // namespace annulus::test
