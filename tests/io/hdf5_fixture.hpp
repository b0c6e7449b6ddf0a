// SPDX-License-Identifier: Apache-2.0
// Files for the tests of lib/io, made and read with the HDF5 C API alone.
#pragma once

#include <annulus/core/error.hpp>
#include <annulus/io/source.hpp>
#include <annulus_test.hpp>

#include "raw_dataset.hpp"
#include "temporary_folder.hpp"

#include <hdf5.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
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

/// The message with which open_input refuses `path`; every one names the file.
inline std::string refusal(const std::string& path) {
  try {
    open_input(path);
  } catch (const InvalidArgument& error) {
    CHECK_THAT(error.what(), contains_text(path));
    CHECK(std::string(error.what()).find('\n') == std::string::npos);
    return error.what();
  }
  return "accepted";
}

/// A filter that is registered as long as it lives; `filter` as H5Z_class2_t wants it, and told by the flag H5Z_FLAG_REVERSE to decode.
class RegisteredFilter {
 public:
  RegisteredFilter(H5Z_filter_t id, const char* name, H5Z_func_t filter) : id_(id) {
    const H5Z_class2_t kind{H5Z_CLASS_T_VERS, id, 1, 1, name, nullptr, nullptr, filter};
    REQUIRE(H5Zregister(&kind) >= 0);
  }
  ~RegisteredFilter() { H5Zunregister(id_); }
  RegisteredFilter(const RegisteredFilter&) = delete;
  RegisteredFilter& operator=(const RegisteredFilter&) = delete;

 private:
  H5Z_filter_t id_;
};

/// Writes q [extents], k and v [extents with kv_heads heads] of the numbers 0, 1, 2, ..., in fp32 and chunks that `filter` encodes.
inline void write_filtered(const std::string& path, H5Z_filter_t filter, const std::vector<hsize_t>& extents, hsize_t kv_heads,
                           const std::vector<hsize_t>& chunk) {
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  REQUIRE(file >= 0);
  for (const char* name : {"q", "k", "v"}) {
    std::vector<hsize_t> own = extents;
    if (name[0] != 'q') { own[own.size() - 2] = kv_heads; }
    std::vector<hsize_t> own_chunk = chunk;
    for (std::size_t axis = 0; axis < own.size(); ++axis) { own_chunk[axis] = std::min(chunk[axis], own[axis]); }
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    REQUIRE(H5Pset_chunk(creation, static_cast<int>(own.size()), own_chunk.data()) >= 0);
    REQUIRE(H5Pset_filter(creation, filter, H5Z_FLAG_MANDATORY, 0, nullptr) >= 0);
    const hid_t space = H5Screate_simple(static_cast<int>(own.size()), own.data(), nullptr);
    const hid_t dataset = H5Dcreate2(file, name, H5T_IEEE_F32LE, space, H5P_DEFAULT, creation, H5P_DEFAULT);
    REQUIRE(dataset >= 0);
    std::vector<float> values(static_cast<std::size_t>(H5Sget_simple_extent_npoints(space)));
    for (std::size_t i = 0; i < values.size(); ++i) { values[i] = static_cast<float>(i % 4093) / 64.0F; }
    REQUIRE(H5Dwrite(dataset, H5T_IEEE_F32LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) >= 0);
    H5Dclose(dataset);
    H5Sclose(space);
    H5Pclose(creation);
  }
  H5Fclose(file);
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

  /// `elements` are in `type`; nullptr writes zeros.
  void dataset(const std::string& name, hid_t type, const std::vector<hsize_t>& extents, const void* elements = nullptr) {
    const hid_t space = H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr);
    const hid_t dataset = H5Dcreate2(file_, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    REQUIRE(dataset >= 0);
    const auto values = static_cast<std::size_t>(H5Sget_simple_extent_npoints(space));
    const std::vector<std::uint8_t> zeros(elements == nullptr ? values * H5Tget_size(type) : 0);
    if (values > 0) { REQUIRE(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, elements == nullptr ? zeros.data() : elements) >= 0); }
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

/// One part of a virtual dataset: what is selected of the whole, and of a dataset of these extents.
struct VirtualPart {
  std::string file;
  std::string dataset;  ///< empty: the name of the whole
  std::vector<hsize_t> extents;
  std::vector<hsize_t> start{};  ///< in the part, of `count` elements `step` apart; empty: all
  std::vector<hsize_t> step{};
  std::vector<hsize_t> count{};
  std::vector<hsize_t> whole_start{};
  std::vector<hsize_t> whole_step{};
  std::vector<hsize_t> whole_count{};
};

inline hid_t space_of(const std::vector<hsize_t>& extents) {
  return H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr);
}

/// Virtual datasets of these names and one layout.
inline void write_virtual(const std::string& path, const std::vector<hsize_t>& extents, const std::vector<VirtualPart>& parts,
                          const std::vector<std::string>& names = {"q", "k", "v"}, hid_t type = H5T_IEEE_F32LE) {
  FileWriter file(path);
  for (const std::string& name : names) {
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    const hid_t whole = space_of(extents);
    for (const VirtualPart& part : parts) {
      const hid_t source = space_of(part.extents);
      if (!part.start.empty()) {
        REQUIRE(H5Sselect_hyperslab(source, H5S_SELECT_SET, part.start.data(), part.step.data(), part.count.data(), nullptr) >= 0);
      }
      REQUIRE(H5Sselect_hyperslab(whole, H5S_SELECT_SET, part.whole_start.data(), part.whole_step.data(), part.whole_count.data(),
                                  nullptr) >= 0);
      REQUIRE(H5Pset_virtual(creation, whole, part.file.c_str(), (part.dataset.empty() ? name : part.dataset).c_str(), source) >= 0);
      H5Sclose(source);
    }
    H5Sselect_all(whole);
    const hid_t dataset = H5Dcreate2(file.get(), name.c_str(), type, whole, H5P_DEFAULT, creation, H5P_DEFAULT);
    REQUIRE(dataset >= 0);
    H5Dclose(dataset);
    H5Sclose(whole);
    H5Pclose(creation);
  }
}

/// Rows [first, first + rows) of a whole of these extents, from a part that holds just them.
inline VirtualPart rows_of(const std::string& file, std::vector<hsize_t> extents, hsize_t first, hsize_t rows) {
  VirtualPart part{file, "", {}};
  part.whole_start.assign(extents.size(), 0);
  part.whole_start[extents.size() - 3] = first;
  part.whole_step.assign(extents.size(), 1);
  extents[extents.size() - 3] = rows;
  part.whole_count = extents;
  part.extents = std::move(extents);
  return part;
}

}  // namespace annulus::test
