// SPDX-License-Identifier: Apache-2.0
// Where values are missing HDF5 gives a fill value, zero by default, and says nothing. Hence the file is asked before it is read.
#pragma once

#include "source_files.hpp"

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace annulus {

/// An open dataset and what messages and searches need to know of it.
struct DatasetPlace {
  hid_t dataset = H5I_INVALID_HID;
  std::string file;  ///< path of the file that holds it
  std::string what;  ///< "input file 'x.h5': /q"
  int depth = 0;     ///< virtual layouts above it
};

/// Requires that every value of the dataset is stored and can be decoded: filters are there, chunks and contiguous storage are allocated,
/// external files are long enough; of a virtual layout, that its parts cover it, and all this of every part. Files found on the way go
/// to `files`.
/// @throws InvalidArgument naming the file, dataset, chunk or filter that is missing
void require_complete(const DatasetPlace& place, SourceFiles& files);

/// Settings of one filter; HDF5 does not tell more of them.
inline constexpr std::size_t kMostFilterSettings = 256;

/// Those that a dataset has, or the largest it may ever grow to (H5S_UNLIMITED: any).
enum class WhichExtents { current, largest };

/// The extents of a dataset; none for a scalar.
std::vector<hsize_t> extents_of(hid_t dataset, WhichExtents which = WhichExtents::current);

/// "[1, 8192, 9, 64]"
std::string shape_text(const std::vector<hsize_t>& extents);

/// An open object and where it lies.
struct OpenedDataset {
  std::shared_ptr<const ReadableFile> holder;  ///< keeps the file open and locked
  Hdf5Handle dataset;
  std::string file;  ///< path of the file that holds it, another than the given one behind an external link
};

/// Opens the dataset `name`, through external links if need be.
/// @return an empty handle if there is no such object
/// @throws InvalidArgument if it is damaged, no dataset, or behind a link whose file is missing
OpenedDataset open_dataset(const std::string& what, std::shared_ptr<const ReadableFile> file, const std::string& path,
                           const std::string& name, SourceFiles& files);

}  // namespace annulus
