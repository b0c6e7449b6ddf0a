// SPDX-License-Identifier: Apache-2.0
// Values of a complete dataset as they are stored, and nothing else in their place: what HDF5 does not ask while it reads is asked here.
#pragma once

#include "chunk_grid.hpp"
#include "complete_dataset.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace annulus {

/// A regular selection of a dataset, elements start + i * step for i < count along each axis, and where they go: the one with indices i
/// to element offset + sum of i * stride of the memory that is read into.
struct SlabCopy {
  std::vector<hsize_t> start;
  std::vector<hsize_t> step;
  std::vector<hsize_t> count;
  hsize_t offset = 0;
  std::vector<hsize_t> stride;
};

/// Elements [start, start + extent), which go to memory in C order, from element `offset` on.
SlabCopy box_in_order(std::vector<hsize_t> start, std::vector<hsize_t> extent, hsize_t offset = 0);

/// What is decoded whole.
struct DecodedUnit {
  std::vector<hsize_t> extents;  ///< along the axes of the dataset; of a virtual one the largest that a chunk of any part takes
  std::uint32_t bytes = 0;       ///< of the largest chunk
  /// Where chunks lie along each axis; of a virtual dataset of each part whose chunks keep their order there.
  std::vector<std::vector<ChunkGrid>> grids;
};

/// How the bytes of an element are brought to memory.
enum class ByteOrder { as_stored, swapped };

/// Copies elements of `size` bytes from one strided array to another; strides are in elements.
void copy_strided(std::size_t size, ByteOrder order, std::vector<hsize_t> count, std::vector<hsize_t> from_stride, const std::byte* from,
                  std::vector<hsize_t> to_stride, std::byte* to);

/// Reads one dataset. To be called under an Hdf5Lock.
class BoxReader {
 public:
  virtual ~BoxReader() = default;

  /// Reads all of `slabs` into `out`; a chunk that went through filters is decoded once.
  /// @throws InvalidArgument naming the chunk that is damaged, RuntimeFailure if the disk fails
  virtual void read(std::span<const SlabCopy> slabs, void* out) = 0;
  /// Nothing where no filter decodes.
  virtual std::optional<DecodedUnit> decoded_unit() const { return std::nullopt; }
  /// Frees what read() keeps.
  virtual void release_buffers() {}
};

/// @param place a dataset that require_complete() let through, open for as long as the reader lives
/// @param order of the bytes that read() gives; HDF5 swaps those of a virtual dataset's parts, and so do readers
std::unique_ptr<BoxReader> make_box_reader(const DatasetPlace& place, H5T_order_t order, SourceFiles& files);

/// The order of the bytes that a dataset stores.
H5T_order_t byte_order_of(hid_t dataset);

}  // namespace annulus
