// SPDX-License-Identifier: Apache-2.0
// What the inputs of attention and of a layer read alike.
#pragma once

#include <annulus/core/problem.hpp>

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

/// Bytes that one call into HDF5 reads: other threads get their turn in between, and a conversion needs this much scratch.
inline constexpr std::int64_t kReadBytes = std::int64_t{8} << 20;

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

/// Checks and converts neighbouring elements, in C order, of dataset `name`, whose first is at `start`. `stored` is scratch afterwards;
/// `out` may be `stored` where the dtype is the same.
/// @throws InvalidArgument naming the first element that is not finite, or no more after it was converted
void convert_values(const FloatDataset& input, const std::string& path, const std::string& name, const std::vector<hsize_t>& start,
                    void* stored, std::int64_t count, DType dtype, void* out);

/// Of the problem that a file holds. @throws InvalidArgument as validate(), naming the file
void require_valid(const Problem& problem, const std::string& path);

/// The root's attribute `name`, or an empty handle.
Hdf5Handle open_attribute(hid_t file, const char* name);

/// The root's attribute scale, or 1/sqrt(head_dim). @throws InvalidArgument if it is no finite float
double read_scale(hid_t file, const std::string& path, std::int64_t head_dim);

/// /kv_lengths [batch], int64; none if there is no such dataset. @throws InvalidArgument if it is of another type or shape
std::vector<std::int64_t> read_kv_lengths(const std::shared_ptr<const ReadableFile>& file, const std::string& path, std::int64_t batch,
                                          SourceFiles& files);

}  // namespace annulus
