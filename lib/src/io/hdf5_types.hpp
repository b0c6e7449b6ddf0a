// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/io/source.hpp>
#include <annulus/kernels/dtype.hpp>

#include "hdf5_handle.hpp"

#include <cstdint>
#include <optional>
#include <string>

namespace annulus {

/// "/q", "/k" or "/v".
const char* dataset_name(Tensor tensor);

/// A float type of a file that this project can hold.
struct FileDType {
  DType dtype = DType::fp32;
  bool byte_swapped = false;  ///< big endian
};

/// The little-endian HDF5 type of `dtype`: IEEE binary32, IEEE binary16, or a 16-bit float with 8 exponent bits for bf16.
Hdf5Handle make_hdf5_type(DType dtype);

/// What `type` is, by its fields rather than by its name, or nothing if it is none of fp32, fp16 and bf16.
std::optional<FileDType> recognise_dtype(hid_t type);

/// For refusals: "64-bit float", "32-bit integer", "string", ...
std::string describe_hdf5_type(hid_t type);

/// Reads an attribute that holds one float: fp64, fp32, fp16 or bf16 of either byte order, decoded here and not by HDF5.
/// @return nothing if the attribute is of another type or holds any other number of values
std::optional<double> read_float_attribute(hid_t attribute);

/// Swaps the bytes of `count` elements of `dtype` in place.
void swap_bytes(DType dtype, void* elements, std::int64_t count);

}  // namespace annulus
