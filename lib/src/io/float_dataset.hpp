// SPDX-License-Identifier: Apache-2.0
// What the inputs of attention and of a layer read alike.
#pragma once

#include "box_reader.hpp"
#include "complete_dataset.hpp"
#include "hdf5_handle.hpp"
#include "hdf5_open.hpp"
#include "hdf5_types.hpp"
#include "source_files.hpp"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace annulus {

/// An open dataset of fp32, fp16 or bf16.
struct FloatDataset {
  OpenedDataset opened;
  FileDType dtype;
  std::vector<hsize_t> extents;       ///< each from 1 to 2^48
  std::unique_ptr<BoxReader> reader;  ///< after make_readable(); used under an Hdf5Lock
};

/// Opens dataset `name` of the input file `path`; nothing if there is none.
/// @throws InvalidArgument naming both if it is damaged, or of another type
std::optional<FloatDataset> open_float_dataset(const std::shared_ptr<const ReadableFile>& file, const std::string& path,
                                               const std::string& name, SourceFiles& files);

/// Asks for all that will be read, and makes the reader. @throws InvalidArgument as require_complete()
void make_readable(FloatDataset& input, const std::string& path, const std::string& name, SourceFiles& files);

/// The root's attribute scale, or 1/sqrt(head_dim). @throws InvalidArgument if it is no finite float
double read_scale(hid_t file, const std::string& path, std::int64_t head_dim);

/// /kv_lengths [batch], int64; none if there is no such dataset. @throws InvalidArgument if it is of another type or shape
std::vector<std::int64_t> read_kv_lengths(const std::shared_ptr<const ReadableFile>& file, const std::string& path, std::int64_t batch,
                                          SourceFiles& files);

}  // namespace annulus
