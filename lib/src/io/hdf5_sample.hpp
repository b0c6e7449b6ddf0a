// SPDX-License-Identifier: Apache-2.0
// Whether two files hold the same values, without reading all of them.
#pragma once

#include "chunk_reader.hpp"
#include "hdf5_types.hpp"

#include <cstdint>
#include <span>
#include <string>

namespace annulus {

/// A dataset [.., seq, heads, head_dim] to sample.
struct SampledDataset {
  hid_t dataset = H5I_INVALID_HID;
  hid_t type = H5I_INVALID_HID;  ///< of the file, and of what is read
  FileDType dtype;
  std::span<const hsize_t> extents;
  std::string what;                 ///< for messages: "input file 'x.h5': /q"
  ChunkReader* filtered = nullptr;  ///< reads it if its chunks went through filters
};

/// TensorSource::fingerprint() of a dataset. Values are compared as stored, but for the order of their bytes.
/// @throws InvalidArgument if what is read is damaged, RuntimeFailure if the system fails to read it
std::uint64_t sample_fingerprint(const SampledDataset& sampled, std::int64_t part, std::int64_t parts);

/// The file that `path` leads to: the running kernel, device and inode. Two paths with equal text are one file.
std::string file_instance(const std::string& path);

}  // namespace annulus
