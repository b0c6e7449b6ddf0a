// SPDX-License-Identifier: Apache-2.0
// Whether two files hold the same values, without reading all of them.
#pragma once

#include "box_reader.hpp"
#include "hdf5_types.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace annulus {

/// Fingerprint::sum of a dataset, whose rows have `row` values. Values are compared as stored, but for the order of their bytes.
/// @throws InvalidArgument if what is read is damaged, RuntimeFailure if the system fails to read it
std::uint64_t sample_fingerprint(BoxReader& reader, const FileDType& dtype, const std::vector<hsize_t>& extents, std::int64_t row,
                                 std::int64_t part, std::int64_t parts);

/// The file that `path` leads to: the running kernel, device and inode. Two paths with equal text are one file.
std::string file_instance(const std::string& path);
/// InputSource::identity() of what these files hold.
std::string file_instances(const std::vector<std::string>& paths);

}  // namespace annulus
