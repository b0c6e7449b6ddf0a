// SPDX-License-Identifier: Apache-2.0
// What the writers of result files share. Every function runs under the caller's Hdf5Lock.
#pragma once

#include <annulus/core/named_column.hpp>

#include "hdf5_file.hpp"
#include "hdf5_handle.hpp"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace annulus {

using Extents = std::vector<hsize_t>;

/// A contiguous dataset whose place in the file is fixed now and whose bytes are written once, by write_block() only. Groups on the way to
/// `name` are made.
Hdf5Handle create_dataset(hid_t file, const std::string& name, hid_t type, const Extents& extents);

/// Writes dense `elements` to dataset[start .. start+extent). @throws RuntimeFailure naming `file` if the disk refuses
void write_block(const Hdf5File& file, const Hdf5Handle& dataset, hid_t type, const Extents& start, const Extents& extent,
                 const void* elements);

/// Closes `dataset`, which may write what HDF5 held back. @throws RuntimeFailure naming `file` if the disk refuses
void close_dataset(const Hdf5File& file, Hdf5Handle& dataset);

/// A dataset with all its elements, dense and in `type`; a scalar without extents.
void write_dataset(const Hdf5File& file, const std::string& name, hid_t type, const Extents& extents, const void* elements);

/// A scalar UTF-8 string of fixed length, zero terminated.
void write_string(const Hdf5File& file, const std::string& name, const std::string& text);

/// Element `index`, or the row of elements [index, ...], of a dataset that write_columns() made. A string that is longer than the dataset's
/// is cut.
/// @throws InvalidArgument if the values are of another type or not as many
void write_row(const Hdf5File& file, const std::string& name, std::int64_t index, const ColumnValues& values);

/// All elements of a dataset that is there. @throws as write_row()
void write_again(const Hdf5File& file, const std::string& name, const ColumnValues& values);

/// <folder>/<name> for each column: of these extents, which hold all its values, int64, fp64 or UTF-8 strings of the longest one's length.
void write_columns(const Hdf5File& file, const std::string& folder, const Extents& extents, std::span<const NamedColumn> columns);

}  // namespace annulus
