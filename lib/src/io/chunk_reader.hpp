// SPDX-License-Identifier: Apache-2.0
// Chunks that went through filters. HDF5 1.10 does not ask whether a filter gave back a whole chunk: of one that decodes to less it hands
// out whatever lies in memory behind it. Its interface shows the length to filters alone; hence one of ours comes last.
#pragma once

#include "box_reader.hpp"
#include "hdf5_handle.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace annulus {

/// Reads a dataset whose chunks went through filters, each chunk decoded once per call and of exactly its length.
/// A chunk is taken as it is stored into a file in memory that has room for one, with the dataset's filters and ours behind them.
class ChunkReader final : public BoxReader {
 public:
  /// @param dataset open for as long as this lives, with chunks and filters that decode
  /// @param what begins messages: "input file 'x.h5': /q"
  ChunkReader(hid_t dataset, std::string what, ByteOrder order);

  void read(std::span<const SlabCopy> slabs, void* out) override;
  std::optional<DecodedUnit> decoded_unit() const override;
  void release_buffers() override;

 private:
  /// The file in memory with a dataset of one chunk that was not written yet.
  void make_image();
  /// Opens a fresh place.
  void open_place();
  /// Takes the chunk at `corner` to the place.
  void take(const std::vector<hsize_t>& corner);
  /// Copies what the slab wants of the decoded chunk at `corner`.
  void copy(const SlabCopy& slab, const std::vector<hsize_t>& corner, const std::byte* chunk, std::byte* out) const;

  hid_t dataset_;
  std::string what_;
  ByteOrder order_;
  Hdf5Handle type_;
  std::size_t size_;  ///< of an element
  std::vector<hsize_t> extents_;
  std::vector<hsize_t> chunk_;
  std::uint32_t chunk_bytes_ = 0;
  bool plain_edges_ = false;  ///< chunks that the extents cut went through no filter
  std::vector<std::byte> image_;
  Hdf5Handle file_;            ///< in memory
  Hdf5Handle place_;           ///< its dataset
  std::uint32_t skipped_ = 0;  ///< filters that the chunk there did not go through, by bit
  std::vector<std::byte> stored_;
};

}  // namespace annulus
