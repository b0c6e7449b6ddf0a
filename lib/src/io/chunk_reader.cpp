// SPDX-License-Identifier: Apache-2.0
#include "chunk_reader.hpp"

#include <annulus/core/error.hpp>

#include "complete_dataset.hpp"
#include "hdf5_open.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

namespace annulus {

namespace {

/// Of the numbers that HDF5 leaves to tests and private use (256 to 511). No file is written with it.
constexpr H5Z_filter_t kLengthFilter = 509;
/// The dataset's name in its file.
constexpr const char* kPlace = "chunk";
/// Values of a filter's settings that are compared; more is taken for one that is not known.
constexpr std::size_t kMostSettings = 256;

/// Bytes of the latest chunk that came to the filter. Guarded by Hdf5Lock.
std::size_t decoded_bytes = 0;

/// Lets a chunk of settings[0] bytes through.
std::size_t require_length(unsigned flags, std::size_t count, const unsigned* settings, std::size_t bytes, std::size_t* /*capacity*/,
                           void** /*buffer*/) {
  if ((flags & H5Z_FLAG_REVERSE) == 0) { return bytes; }
  decoded_bytes = bytes;
  return count == 1 && bytes == settings[0] ? bytes : 0;
}

struct FilterSettings {
  H5Z_filter_t filter = H5Z_FILTER_ERROR;
  unsigned flags = 0;
  std::vector<unsigned> values;

  bool operator==(const FilterSettings&) const = default;
};

/// Those of a pipeline from its filter `first` on; empty if one has more than are looked at.
std::vector<FilterSettings> settings_of(hid_t creation, int first) {
  std::vector<FilterSettings> all;
  const int filters = check_h5(H5Pget_nfilters(creation), "H5Pget_nfilters");
  for (int index = first; index < filters; ++index) {
    FilterSettings& own = all.emplace_back();
    own.values.resize(kMostSettings);
    std::size_t count = own.values.size();
    unsigned config = 0;
    own.filter =
        check_h5(H5Pget_filter2(creation, static_cast<unsigned>(index), &own.flags, &count, own.values.data(), 0, nullptr, &config),
                 "H5Pget_filter2");
    if (count > kMostSettings) { return {}; }
    own.values.resize(count);
  }
  return all;
}

/// So that no chunk is kept decoded.
Hdf5Handle uncached_access() {
  Hdf5Handle access(check_h5(H5Pcreate(H5P_DATASET_ACCESS), "H5Pcreate"));
  check_h5(H5Pset_chunk_cache(access.get(), 0, 0, 0), "H5Pset_chunk_cache");
  return access;
}

}  // namespace

ChunkReader::ChunkReader(hid_t dataset, std::string what)
    : dataset_(dataset),
      what_(std::move(what)),
      type_(check_h5(H5Dget_type(dataset), "H5Dget_type")),
      extents_(extents_of(dataset)),
      chunk_(extents_.size()) {
  const Hdf5Handle creation(check_h5(H5Dget_create_plist(dataset), "H5Dget_create_plist"));
  check_h5(H5Pget_chunk(creation.get(), static_cast<int>(chunk_.size()), chunk_.data()), "H5Pget_chunk");
  unsigned options = 0;
  check_h5(H5Pget_chunk_opts(creation.get(), &options), "H5Pget_chunk_opts");
  plain_edges_ = (options & H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS) != 0;
  hsize_t bytes = H5Tget_size(type_.get());
  for (const hsize_t extent : chunk_) {
    ANNULUS_EXPECTS(extent > 0 && bytes <= std::numeric_limits<std::uint32_t>::max() / extent, "{} is damaged: its chunks are {}", what_,
                    shape_text(chunk_));
    bytes *= extent;
  }
  chunk_bytes_ = static_cast<std::uint32_t>(bytes);
  make_place();
}

void ChunkReader::make_place() {
  const Hdf5Handle creation(check_h5(H5Dget_create_plist(dataset_), "H5Dget_create_plist"));
  if (H5Zfilter_avail(kLengthFilter) <= 0) {
    const H5Z_class2_t kind{H5Z_CLASS_T_VERS, kLengthFilter, 1, 1, "length of a chunk", nullptr, nullptr, require_length};
    check_h5(H5Zregister(&kind), "H5Zregister");
  }
  const std::vector<FilterSettings> filters = settings_of(creation.get(), 0);
  const Hdf5Handle properties(check_h5(H5Pcreate(H5P_DATASET_CREATE), "H5Pcreate"));
  check_h5(H5Pset_chunk(properties.get(), static_cast<int>(chunk_.size()), chunk_.data()), "H5Pset_chunk");
  check_h5(H5Pset_fill_time(properties.get(), H5D_FILL_TIME_NEVER), "H5Pset_fill_time");
  // Decoding begins with a pipeline's last filter and ends with its first.
  check_h5(H5Pset_filter(properties.get(), kLengthFilter, H5Z_FLAG_MANDATORY, 1, &chunk_bytes_), "H5Pset_filter");
  for (const FilterSettings& filter : filters) {
    if (H5Pset_filter(properties.get(), filter.filter, filter.flags, filter.values.size(), filter.values.data()) < 0) { return; }
  }
  const Hdf5Handle access(check_h5(H5Pcreate(H5P_FILE_ACCESS), "H5Pcreate"));
  constexpr std::size_t kIncrement = std::size_t{1} << 16;
  check_h5(H5Pset_fapl_core(access.get(), kIncrement, 0), "H5Pset_fapl_core");
  // HDF5 tells files in memory apart by their names, which are nowhere on a disk.
  static std::uint64_t number = 0;
  const std::string name = fmt::format("annulus-chunk-{}", number++);
  file_ = Hdf5Handle(check_h5(H5Fcreate(name.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), "H5Fcreate"));
  const Hdf5Handle uncached = uncached_access();
  const Hdf5Handle space(check_h5(H5Screate_simple(static_cast<int>(chunk_.size()), chunk_.data(), nullptr), "H5Screate_simple"));
  place_ = Hdf5Handle(H5Dcreate2(file_.get(), kPlace, type_.get(), space.get(), H5P_DEFAULT, properties.get(), uncached.get()));
  if (!place_) { return; }
  // A new dataset asks its filters for settings; the chunks want those of the file.
  const Hdf5Handle made(check_h5(H5Dget_create_plist(place_.get()), "H5Dget_create_plist"));
  if (filters.empty() || settings_of(made.get(), 1) != filters) { place_.reset(); }
}

void ChunkReader::take(const std::vector<hsize_t>& corner) {
  hsize_t bytes = 0;
  if (H5Dget_chunk_storage_size(dataset_, corner.data(), &bytes) < 0) { refuse_unreadable(what_); }
  stored_.resize(bytes);
  std::uint32_t skipped = 0;
  if (H5Dread_chunk(dataset_, H5P_DEFAULT, corner.data(), &skipped, stored_.data()) < 0) {
    refuse_unreadable(fmt::format("{} at {}", what_, shape_text(corner)));
  }
  bool cut = false;
  for (std::size_t axis = 0; axis < corner.size(); ++axis) { cut = cut || chunk_[axis] > extents_[axis] - corner[axis]; }
  skipped = plain_edges_ && cut ? ~std::uint32_t{1} : skipped << 1U;  // bit 0 is ours
  if (skipped != skipped_) {
    // HDF5 keeps the old ones for a chunk that is written again.
    place_.reset();
    make_place();
    ANNULUS_ASSERT(place_, "{}: its filters were taken for one chunk and not for the next", what_);
    skipped_ = skipped;
  }
  const std::vector<hsize_t> origin(corner.size(), 0);
  check_h5(H5Dwrite_chunk(place_.get(), H5P_DEFAULT, skipped, origin.data(), stored_.size(), stored_.data()), "H5Dwrite_chunk");
  if (skipped != 0) {
    // The open dataset remembers the chunk without them.
    const Hdf5Handle uncached = uncached_access();
    place_.reset();
    place_ = Hdf5Handle(check_h5(H5Dopen2(file_.get(), kPlace, uncached.get()), "H5Dopen2"));
  }
}

void ChunkReader::read(const std::vector<hsize_t>& start, const std::vector<hsize_t>& extent, void* out) {
  const std::size_t rank = extents_.size();
  const Hdf5Handle memory(check_h5(H5Screate_simple(static_cast<int>(rank), extent.data(), nullptr), "H5Screate_simple"));
  if (!place_) {
    const Hdf5Handle space(check_h5(H5Dget_space(dataset_), "H5Dget_space"));
    check_h5(H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, start.data(), nullptr, extent.data(), nullptr), "H5Sselect_hyperslab");
    if (H5Dread(dataset_, type_.get(), memory.get(), space.get(), H5P_DEFAULT, out) < 0) {
      refuse_unreadable(fmt::format("{} at {}", what_, shape_text(start)));
    }
    return;
  }
  const Hdf5Handle space(check_h5(H5Screate_simple(static_cast<int>(rank), chunk_.data(), nullptr), "H5Screate_simple"));
  std::vector<hsize_t> corner(rank);
  for (std::size_t axis = 0; axis < rank; ++axis) { corner[axis] = start[axis] / chunk_[axis] * chunk_[axis]; }
  const std::vector<hsize_t> first = corner;
  std::vector<hsize_t> from(rank);
  std::vector<hsize_t> to(rank);
  std::vector<hsize_t> count(rank);
  for (;;) {
    for (std::size_t axis = 0; axis < rank; ++axis) {
      const hsize_t begin = std::max(start[axis], corner[axis]);
      from[axis] = begin - corner[axis];
      to[axis] = begin - start[axis];
      count[axis] = std::min(start[axis] + extent[axis], corner[axis] + chunk_[axis]) - begin;
    }
    take(corner);
    check_h5(H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, from.data(), nullptr, count.data(), nullptr), "H5Sselect_hyperslab");
    check_h5(H5Sselect_hyperslab(memory.get(), H5S_SELECT_SET, to.data(), nullptr, count.data(), nullptr), "H5Sselect_hyperslab");
    decoded_bytes = chunk_bytes_;
    if (H5Dread(place_.get(), type_.get(), memory.get(), space.get(), H5P_DEFAULT, out) < 0) {
      ANNULUS_EXPECTS(decoded_bytes == chunk_bytes_, "{} is damaged: its chunk at {} decodes to {} bytes, and a chunk is {}", what_,
                      shape_text(corner), decoded_bytes, chunk_bytes_);
      refuse_unreadable(fmt::format("{} at {}", what_, shape_text(corner)));
    }
    std::size_t axis = rank;
    while (axis > 0 && (corner[axis - 1] += chunk_[axis - 1]) >= start[axis - 1] + extent[axis - 1]) {
      --axis;
      corner[axis] = first[axis];
    }
    if (axis == 0) { return; }
  }
}

void ChunkReader::read_elements(const std::vector<hsize_t>& coordinates, void* out) {
  const std::size_t rank = extents_.size();
  const std::size_t size = H5Tget_size(type_.get());
  std::map<std::vector<hsize_t>, std::vector<std::size_t>> by_chunk;
  for (std::size_t element = 0; element * rank < coordinates.size(); ++element) {
    std::vector<hsize_t> corner(rank);
    for (std::size_t axis = 0; axis < rank; ++axis) { corner[axis] = coordinates[element * rank + axis] / chunk_[axis] * chunk_[axis]; }
    by_chunk[corner].push_back(element);
  }
  std::vector<std::byte> decoded;
  for (const auto& [corner, elements] : by_chunk) {
    // The box around those of a chunk.
    std::vector<hsize_t> first = extents_;
    std::vector<hsize_t> extent(rank, 0);
    for (const std::size_t element : elements) {
      for (std::size_t axis = 0; axis < rank; ++axis) { first[axis] = std::min(first[axis], coordinates[element * rank + axis]); }
    }
    std::size_t values = 1;
    for (std::size_t axis = 0; axis < rank; ++axis) {
      for (const std::size_t element : elements) {
        extent[axis] = std::max(extent[axis], coordinates[element * rank + axis] + 1 - first[axis]);
      }
      values *= extent[axis];
    }
    decoded.resize(values * size);
    read(first, extent, decoded.data());
    for (const std::size_t element : elements) {
      std::size_t place = 0;
      for (std::size_t axis = 0; axis < rank; ++axis) { place = place * extent[axis] + (coordinates[element * rank + axis] - first[axis]); }
      std::memcpy(static_cast<std::byte*>(out) + element * size, decoded.data() + place * size, size);
    }
  }
}

}  // namespace annulus
