// SPDX-License-Identifier: Apache-2.0
// Chunks that went through filters. HDF5 1.10 does not ask whether a filter gave back a whole chunk: of one that decodes to less it hands
// out whatever lies in memory behind it. Its interface shows the length to filters alone; hence one of ours comes last.
#pragma once

#include "hdf5_handle.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace annulus {

/// Reads boxes of one dataset whose chunks went through filters, chunk by chunk, each decoded once per call and of exactly its length.
/// A chunk is taken as it is stored into a file in memory that has room for one, with the dataset's filters and ours behind them.
class ChunkReader {
 public:
  /// @param dataset open for as long as this lives, with chunks and filters that decode
  /// @param what begins messages: "input file 'x.h5': /q"
  ChunkReader(hid_t dataset, std::string what);

  /// Elements [start, start + extent) as stored, in C order, into `out`. Under an Hdf5Lock.
  /// @throws InvalidArgument naming the chunk if it does not decode, or not to its length; RuntimeFailure if the disk fails
  void read(const std::vector<hsize_t>& start, const std::vector<hsize_t>& extent, void* out);
  /// The elements at these places, [count, axes], in their order into `out`. Under an Hdf5Lock. @throws as read()
  void read_elements(const std::vector<hsize_t>& coordinates, void* out);

 private:
  /// The dataset of one chunk, in memory. Empty where a filter does not take its own settings for a new dataset, as one that only decodes.
  void make_place();
  /// Takes the chunk at `corner` to the place.
  void take(const std::vector<hsize_t>& corner);

  hid_t dataset_;
  std::string what_;
  Hdf5Handle type_;
  std::vector<hsize_t> extents_;
  std::vector<hsize_t> chunk_;
  std::uint32_t chunk_bytes_ = 0;
  bool plain_edges_ = false;   ///< chunks that the extents cut went through no filter
  Hdf5Handle file_;            ///< in memory
  Hdf5Handle place_;           ///< its dataset
  std::uint32_t skipped_ = 0;  ///< filters that the chunk there did not go through, by bit
  std::vector<std::byte> stored_;
};

}  // namespace annulus
