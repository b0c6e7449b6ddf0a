// SPDX-License-Identifier: Apache-2.0
#include "chunk_reader.hpp"

#include <annulus/core/error.hpp>

#include "hdf5_open.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string_view>
#include <utility>

namespace annulus {

namespace {

/// Of the numbers that HDF5 leaves to tests and private use (256 to 511). No file is written with them.
constexpr H5Z_filter_t kLengthFilter = 509;
constexpr H5Z_filter_t kStandInFilter = 510;
/// The name of the filter that stands in for another, which HDF5 writes into a file next to its number.
constexpr std::string_view kStandInName = "annulus: stands in for a filter";
/// The dataset's name in its file.
constexpr const char* kPlace = "chunk";

/// What the filter of ours does with the chunk that is decoded. Guarded by Hdf5Lock.
struct Decoding {
  std::size_t bytes = 0;                       ///< that came to it
  std::function<void(const std::byte*)> take;  ///< copies what is wanted of a whole chunk, once
};
Decoding decoding;

/// Lets a chunk of settings[0] bytes through.
std::size_t require_length(unsigned flags, std::size_t count, const unsigned* settings, std::size_t bytes, std::size_t* /*capacity*/,
                           void** buffer) {
  if ((flags & H5Z_FLAG_REVERSE) == 0) { return bytes; }
  decoding.bytes = bytes;
  if (count != 1 || bytes != settings[0]) { return 0; }
  if (decoding.take) { std::exchange(decoding.take, nullptr)(static_cast<const std::byte*>(*buffer)); }
  return bytes;
}

std::size_t leave_as_it_is(unsigned /*flags*/, std::size_t /*count*/, const unsigned* /*settings*/, std::size_t bytes,
                           std::size_t* /*capacity*/, void** /*buffer*/) {
  return bytes;
}

void register_filters() {
  if (H5Zfilter_avail(kLengthFilter) > 0) { return; }
  for (const H5Z_class2_t& kind :
       {H5Z_class2_t{H5Z_CLASS_T_VERS, kLengthFilter, 1, 1, "length of a chunk", nullptr, nullptr, require_length},
        H5Z_class2_t{H5Z_CLASS_T_VERS, kStandInFilter, 1, 1, kStandInName.data(), nullptr, nullptr, leave_as_it_is}}) {
    check_h5(H5Zregister(&kind), "H5Zregister");
  }
}

struct FilterSettings {
  H5Z_filter_t filter = H5Z_FILTER_ERROR;
  unsigned flags = 0;
  std::vector<unsigned> values;

  bool operator==(const FilterSettings&) const = default;
};

/// Those of a pipeline from its filter `first` on.
std::vector<FilterSettings> settings_of(hid_t creation, int first) {
  std::vector<FilterSettings> all;
  const int filters = check_h5(H5Pget_nfilters(creation), "H5Pget_nfilters");
  for (int index = first; index < filters; ++index) {
    FilterSettings& own = all.emplace_back();
    own.values.resize(kMostFilterSettings);
    std::size_t count = own.values.size();
    unsigned config = 0;
    own.filter =
        check_h5(H5Pget_filter2(creation, static_cast<unsigned>(index), &own.flags, &count, own.values.data(), 0, nullptr, &config),
                 "H5Pget_filter2");
    own.values.resize(std::min(count, own.values.size()));
  }
  return all;
}

/// So that no chunk is kept decoded.
Hdf5Handle uncached_access() {
  Hdf5Handle access(check_h5(H5Pcreate(H5P_DATASET_ACCESS), "H5Pcreate"));
  check_h5(H5Pset_chunk_cache(access.get(), 0, 0, 0), "H5Pset_chunk_cache");
  return access;
}

/// A file in memory, made of `image` if that is not empty. HDF5 tells such files apart by their names, which are nowhere on a disk.
Hdf5Handle file_in_memory(std::vector<std::byte>& image) {
  const Hdf5Handle access(check_h5(H5Pcreate(H5P_FILE_ACCESS), "H5Pcreate"));
  constexpr std::size_t kIncrement = std::size_t{1} << 16;
  check_h5(H5Pset_fapl_core(access.get(), kIncrement, 0), "H5Pset_fapl_core");
  static std::uint64_t number = 0;
  const std::string name = fmt::format("annulus-chunk-{}", number++);
  if (image.empty()) { return Hdf5Handle(check_h5(H5Fcreate(name.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), "H5Fcreate")); }
  check_h5(H5Pset_file_image(access.get(), image.data(), image.size()), "H5Pset_file_image");
  return Hdf5Handle(check_h5(H5Fopen(name.c_str(), H5F_ACC_RDWR, access.get()), "H5Fopen"));
}

/// The dataset's own type, which belongs to no file.
Hdf5Handle memory_type_of(hid_t dataset) {
  const Hdf5Handle type(check_h5(H5Dget_type(dataset), "H5Dget_type"));
  return Hdf5Handle(check_h5(H5Tcopy(type.get()), "H5Tcopy"));
}

/// The corner of the first chunk along an axis at or past index `index` of the slab, and the first index past that chunk.
struct ChunkAlong {
  hsize_t corner = 0;
  hsize_t end = 0;
};

ChunkAlong chunk_along(const SlabCopy& slab, std::size_t axis, hsize_t index, hsize_t extent) {
  const hsize_t corner = (slab.start[axis] + index * slab.step[axis]) / extent * extent;
  const hsize_t inside = corner + extent - 1 - slab.start[axis];
  return {corner, std::min(slab.count[axis], inside / slab.step[axis] + 1)};
}

}  // namespace

ChunkReader::ChunkReader(hid_t dataset, std::string what, ByteOrder order)
    : dataset_(dataset),
      what_(std::move(what)),
      order_(order),
      type_(memory_type_of(dataset)),
      size_(H5Tget_size(type_.get())),
      extents_(extents_of(dataset)),
      chunk_(extents_.size()) {
  const Hdf5Handle creation(check_h5(H5Dget_create_plist(dataset), "H5Dget_create_plist"));
  check_h5(H5Pget_chunk(creation.get(), static_cast<int>(chunk_.size()), chunk_.data()), "H5Pget_chunk");
  unsigned options = 0;
  check_h5(H5Pget_chunk_opts(creation.get(), &options), "H5Pget_chunk_opts");
  plain_edges_ = (options & H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS) != 0;
  hsize_t bytes = size_;
  for (const hsize_t extent : chunk_) {
    ANNULUS_EXPECTS(extent > 0 && bytes <= std::numeric_limits<std::uint32_t>::max() / extent, "{} is damaged: its chunks are {}", what_,
                    shape_text(chunk_));
    bytes *= extent;
  }
  chunk_bytes_ = static_cast<std::uint32_t>(bytes);
}

std::optional<DecodedUnit> ChunkReader::decoded_unit() const {
  DecodedUnit unit{chunk_, chunk_bytes_, {}};
  for (std::size_t axis = 0; axis < chunk_.size(); ++axis) {
    const auto extent = static_cast<std::int64_t>(extents_[axis]);
    unit.grids.push_back({{0, extent, std::min(extent, static_cast<std::int64_t>(chunk_[axis]))}});
  }
  return unit;
}

void ChunkReader::make_image() {
  register_filters();
  const Hdf5Handle creation(check_h5(H5Dget_create_plist(dataset_), "H5Dget_create_plist"));
  const std::vector<FilterSettings> filters = settings_of(creation.get(), 0);
  const Hdf5Handle properties(check_h5(H5Pcreate(H5P_DATASET_CREATE), "H5Pcreate"));
  check_h5(H5Pset_chunk(properties.get(), static_cast<int>(chunk_.size()), chunk_.data()), "H5Pset_chunk");
  check_h5(H5Pset_fill_time(properties.get(), H5D_FILL_TIME_NEVER), "H5Pset_fill_time");
  // Decoding begins with a pipeline's last filter and ends with its first.
  check_h5(H5Pset_filter(properties.get(), kLengthFilter, H5Z_FLAG_MANDATORY, 1, &chunk_bytes_), "H5Pset_filter");
  // A filter may not take its own settings for a new dataset: it only decodes, or writes those of a newer version of itself. Hence HDF5
  // writes a filter of ours into the file, which takes any, and the number is changed afterwards.
  for (const FilterSettings& filter : filters) {
    check_h5(H5Pset_filter(properties.get(), kStandInFilter, filter.flags, filter.values.size(), filter.values.data()), "H5Pset_filter");
  }
  {
    const Hdf5Handle file = file_in_memory(image_);
    const Hdf5Handle space(check_h5(H5Screate_simple(static_cast<int>(chunk_.size()), chunk_.data(), nullptr), "H5Screate_simple"));
    Hdf5Handle place(
        check_h5(H5Dcreate2(file.get(), kPlace, type_.get(), space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT), "H5Dcreate2"));
    place.reset();
    check_h5(H5Fflush(file.get(), H5F_SCOPE_GLOBAL), "H5Fflush");
    const ssize_t bytes = H5Fget_file_image(file.get(), nullptr, 0);
    ANNULUS_ASSERT(bytes > 0, "{}: the file in memory has {} bytes", what_, bytes);
    image_.resize(static_cast<std::size_t>(bytes));
    ANNULUS_ASSERT(H5Fget_file_image(file.get(), image_.data(), image_.size()) == bytes, "{}: the file in memory changed", what_);
  }
  // The filter pipeline message, version 1 (HDF5 File Format Specification IV.A.2.l): of each filter its number, the length of its name,
  // its flags and the number of its settings, 16 bits each, little endian; then the name.
  constexpr std::ptrdiff_t kNumberBeforeName = 8;
  const auto* name = reinterpret_cast<const std::byte*>(kStandInName.data());
  auto place = image_.begin();
  for (const FilterSettings& filter : filters) {
    place = std::search(place, image_.end(), name, name + kStandInName.size());
    ANNULUS_ASSERT(place != image_.end(), "{}: a filter is missing in the file in memory", what_);
    place[-kNumberBeforeName] = static_cast<std::byte>(static_cast<unsigned>(filter.filter) & 0xffU);
    place[-kNumberBeforeName + 1] = static_cast<std::byte>(static_cast<unsigned>(filter.filter) >> 8U);
    ++place;
  }
  open_place();
  const Hdf5Handle made(check_h5(H5Dget_create_plist(place_.get()), "H5Dget_create_plist"));
  ANNULUS_ASSERT(settings_of(made.get(), 1) == filters, "{}: the file in memory has other filters", what_);
}

void ChunkReader::open_place() {
  place_.reset();
  file_.reset();
  file_ = file_in_memory(image_);
  const Hdf5Handle uncached = uncached_access();
  place_ = Hdf5Handle(check_h5(H5Dopen2(file_.get(), kPlace, uncached.get()), "H5Dopen2"));
  skipped_ = 0;
}

void ChunkReader::release_buffers() {
  place_.reset();
  file_.reset();
  stored_ = {};
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
  if (image_.empty()) {
    make_image();
  } else if (!place_ || skipped != skipped_) {
    // HDF5 keeps the old ones for a chunk that is written again.
    open_place();
  }
  skipped_ = skipped;
  const std::vector<hsize_t> origin(corner.size(), 0);
  check_h5(H5Dwrite_chunk(place_.get(), H5P_DEFAULT, skipped, origin.data(), stored_.size(), stored_.data()), "H5Dwrite_chunk");
  if (skipped != 0) {
    // The open dataset remembers the chunk without them.
    const Hdf5Handle uncached = uncached_access();
    place_.reset();
    place_ = Hdf5Handle(check_h5(H5Dopen2(file_.get(), kPlace, uncached.get()), "H5Dopen2"));
  }
}

void ChunkReader::copy(const SlabCopy& slab, const std::vector<hsize_t>& corner, const std::byte* chunk, std::byte* out) const {
  const std::size_t rank = chunk_.size();
  std::vector<hsize_t> count(rank);
  std::vector<hsize_t> from_stride(rank);
  hsize_t from = 0;
  hsize_t to = slab.offset;
  hsize_t stride = 1;
  for (std::size_t axis = rank; axis-- > 0;) {
    const hsize_t step = slab.step[axis];
    const hsize_t first = corner[axis] > slab.start[axis] ? (corner[axis] - slab.start[axis] + step - 1) / step : 0;
    count[axis] = chunk_along(slab, axis, first, chunk_[axis]).end - first;
    from += (slab.start[axis] + first * step - corner[axis]) * stride;
    to += first * slab.stride[axis];
    from_stride[axis] = step * stride;
    stride *= chunk_[axis];
  }
  copy_strided(size_, order_, std::move(count), std::move(from_stride), chunk + from * size_, slab.stride, out + to * size_);
}

void ChunkReader::read(std::span<const SlabCopy> slabs, void* out) {
  const std::size_t rank = chunk_.size();
  std::map<std::vector<hsize_t>, std::vector<const SlabCopy*>> by_chunk;
  for (const SlabCopy& slab : slabs) {
    std::vector<ChunkAlong> along(rank);
    for (std::size_t axis = 0; axis < rank; ++axis) { along[axis] = chunk_along(slab, axis, 0, chunk_[axis]); }
    std::vector<hsize_t> corner(rank);
    for (bool more = true; more;) {
      for (std::size_t axis = 0; axis < rank; ++axis) { corner[axis] = along[axis].corner; }
      by_chunk[corner].push_back(&slab);
      more = false;
      for (std::size_t axis = rank; axis-- > 0 && !more;) {
        more = along[axis].end < slab.count[axis];
        along[axis] = chunk_along(slab, axis, more ? along[axis].end : 0, chunk_[axis]);
      }
    }
  }
  const std::vector<hsize_t> one(rank, 1);
  const std::vector<hsize_t> origin(rank, 0);
  const Hdf5Handle memory(check_h5(H5Screate_simple(static_cast<int>(rank), one.data(), nullptr), "H5Screate_simple"));
  const Hdf5Handle first(check_h5(H5Screate_simple(static_cast<int>(rank), chunk_.data(), nullptr), "H5Screate_simple"));
  check_h5(H5Sselect_hyperslab(first.get(), H5S_SELECT_SET, origin.data(), nullptr, one.data(), nullptr), "H5Sselect_hyperslab");
  std::vector<std::byte> element(size_);
  for (const auto& [corner, wanted] : by_chunk) {
    take(corner);
    // HDF5 is asked for one element; all that is wanted is taken from the whole chunk as it passes our filter.
    decoding = {chunk_bytes_, [&](const std::byte* chunk) {
                  for (const SlabCopy* slab : wanted) { copy(*slab, corner, chunk, static_cast<std::byte*>(out)); }
                }};
    const herr_t status = H5Dread(place_.get(), type_.get(), memory.get(), first.get(), H5P_DEFAULT, element.data());
    const bool taken = std::exchange(decoding.take, nullptr) == nullptr;
    if (status < 0) {
      ANNULUS_EXPECTS(decoding.bytes == chunk_bytes_, "{} is damaged: its chunk at {} decodes to {} bytes, and a chunk is {}", what_,
                      shape_text(corner), decoding.bytes, chunk_bytes_);
      refuse_unreadable(fmt::format("{} at {}", what_, shape_text(corner)));
    }
    ANNULUS_ASSERT(taken, "{}: its chunk at {} did not pass the filter", what_, shape_text(corner));
  }
}

}  // namespace annulus
