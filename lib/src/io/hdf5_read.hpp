// SPDX-License-Identifier: Apache-2.0
// Reads back what hdf5_write.hpp writes. Every function runs under the caller's Hdf5Lock.
#pragma once

#include <annulus/core/named_column.hpp>

#include "hdf5_open.hpp"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

/// A dataset of a result file.
struct ReadColumn {
  NamedColumn column;
  std::vector<std::int64_t> extents;  ///< none: a scalar
};

/// The names in a folder of the file, in alphabetical order. `what` begins messages: "result file 'x.h5'".
/// @throws InvalidArgument if there is no such folder
std::vector<std::string> names_in(const ReadableFile& file, const std::string& what, const std::string& folder);

/// A dataset of any open file: int64, fp64 or strings of a fixed length. @param file_bytes  that its values cannot exceed
/// @throws InvalidArgument if there is none or it has another form
ReadColumn read_column(hid_t file, std::int64_t file_bytes, const std::string& what, const std::string& path);

/// <folder>/<name> of the file. @throws as above
ReadColumn read_column(const ReadableFile& file, const std::string& what, const std::string& folder, const std::string& name);

/// Every dataset of a folder. @throws InvalidArgument as read_column()
std::vector<ReadColumn> read_columns(const ReadableFile& file, const std::string& what, const std::string& folder);

/// Every text of a folder by its name: provenance. @throws InvalidArgument if something else is there too
std::vector<std::pair<std::string, std::string>> read_texts(const ReadableFile& file, const std::string& what, const std::string& folder);

}  // namespace annulus
