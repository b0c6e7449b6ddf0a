// SPDX-License-Identifier: Apache-2.0
#include "complete_dataset.hpp"

#include <annulus/core/error.hpp>

#include "hdf5_open.hpp"
#include "virtual_layout.hpp"

#include <array>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <sys/stat.h>
#include <system_error>

namespace annulus {

namespace {

/// Links followed from one name before they are taken for a circle.
constexpr int kMostLinks = 16;

void require_filters(const DatasetPlace& place, hid_t creation) {
  const int filters = check_h5(H5Pget_nfilters(creation), "H5Pget_nfilters");
  for (int index = 0; index < filters; ++index) {
    unsigned flags = 0;
    std::size_t values = 0;
    std::array<char, 256> name{};
    unsigned config = 0;
    const H5Z_filter_t filter =
        H5Pget_filter2(creation, static_cast<unsigned>(index), &flags, &values, nullptr, name.size() - 1, name.data(), &config);
    if (filter < 0) { refuse_unreadable(place.what); }
    const std::string shown = name[0] == '\0' ? fmt::format("filter {}", filter) : fmt::format("filter {} ({})", filter, name.data());
    ANNULUS_EXPECTS(H5Zfilter_avail(filter) > 0,
                    "{} is compressed by {}, which this HDF5 does not have; set HDF5_PLUGIN_PATH to the folder of its plugin, or rewrite "
                    "the file with gzip",
                    place.what, shown);
    ANNULUS_EXPECTS(values <= kMostFilterSettings,
                    "{} is compressed by {} with {} settings, and at most {} can be asked for; rewrite the "
                    "file with gzip",
                    place.what, shown, values, kMostFilterSettings);
    unsigned abilities = 0;
    ANNULUS_EXPECTS(H5Zget_filter_info(filter, &abilities) >= 0 && (abilities & H5Z_FILTER_CONFIG_DECODE_ENABLED) != 0,
                    "{} is compressed by {}, which this HDF5 cannot decode; rewrite the file with gzip", place.what, shown);
  }
}

/// Bytes of all values. @throws InvalidArgument where no file has so many
hsize_t bytes_of(const DatasetPlace& place) {
  const Hdf5Handle type(check_h5(H5Dget_type(place.dataset), "H5Dget_type"));
  const std::vector<hsize_t> extents = extents_of(place.dataset);
  constexpr auto kMost = static_cast<hsize_t>(std::numeric_limits<std::int64_t>::max());
  hsize_t bytes = H5Tget_size(type.get());
  for (const hsize_t extent : extents) {
    ANNULUS_EXPECTS(extent == 0 || bytes <= kMost / extent, "{} is {}, more than a file can hold", place.what, shape_text(extents));
    bytes *= extent;
  }
  return bytes;
}

void require_external(const DatasetPlace& place, hid_t creation, int count, SourceFiles& files) {
  hsize_t left = bytes_of(place);
  for (int index = 0; index < count && left > 0; ++index) {
    // HDF5 does not tell whether the name fitted.
    std::vector<char> name(65536, '\0');
    off_t offset = 0;
    hsize_t size = 0;
    if (H5Pget_external(creation, static_cast<unsigned>(index), name.size() - 1, name.data(), &offset, &size) < 0) {
      refuse_unreadable(place.what);
    }
    const std::string path = SourceFiles::find(place.what, SourceKind::external_storage, place.file, name.data());
    struct stat status{};
    ANNULUS_EXPECTS(::stat(path.c_str(), &status) == 0, "{}: '{}': {}", place.what, path, std::generic_category().message(errno));
    ANNULUS_EXPECTS(S_ISREG(status.st_mode), "{}: '{}', which holds its values, is not a regular file", place.what, path);
    const hsize_t needed = size == H5F_UNLIMITED || size > left ? left : size;
    const auto available = static_cast<hsize_t>(status.st_size);
    const auto begin = static_cast<hsize_t>(offset);
    ANNULUS_EXPECTS(offset >= 0 && begin <= available && needed <= available - begin,
                    "{}: '{}' is too short: {} bytes of values begin at {}, and it has {}", place.what, path, needed, offset, available);
    files.add_raw(path);
    left -= needed;
  }
  ANNULUS_EXPECTS(left == 0, "{}: the files that hold its values lack {} bytes", place.what, left);
}

void require_contiguous(const DatasetPlace& place, hid_t creation, SourceFiles& files) {
  if (const int external = check_h5(H5Pget_external_count(creation), "H5Pget_external_count"); external > 0) {
    require_external(place, creation, external, files);
    return;
  }
  ANNULUS_EXPECTS(H5Dget_offset(place.dataset) != HADDR_UNDEF, "{} was created but never written", place.what);
}

/// Bytes that are stored must be those of the extent: a header that was changed may say otherwise.
void require_size(const DatasetPlace& place) {
  const hsize_t stored = H5Dget_storage_size(place.dataset);
  const hsize_t needed = bytes_of(place);
  ANNULUS_EXPECTS(stored == needed, "{} is damaged: it is {} bytes by its shape, and {} are stored", place.what, needed, stored);
}

/// Of a chunk without filters HDF5 reads the bytes that the index tells, and hands out a whole one, whatever lies behind them in memory. It
/// tells a chunk's own length only by a walk of the whole index, hence the sum. Where there are filters ChunkReader counts what they give.
void require_plain_lengths(const DatasetPlace& place, hid_t creation, const std::vector<hsize_t>& chunk, std::int64_t chunks) {
  if (check_h5(H5Pget_nfilters(creation), "H5Pget_nfilters") > 0) { return; }
  const Hdf5Handle type(check_h5(H5Dget_type(place.dataset), "H5Dget_type"));
  const hsize_t whole =
      std::accumulate(chunk.begin(), chunk.end(), static_cast<hsize_t>(H5Tget_size(type.get())), std::multiplies<hsize_t>());
  const hsize_t stored = H5Dget_storage_size(place.dataset);
  ANNULUS_EXPECTS(stored % whole == 0 && stored / whole == static_cast<hsize_t>(chunks),
                  "{} is damaged: {} chunks of {} bytes should be stored, and {} bytes are", place.what, chunks, whole, stored);
}

/// Asks for every chunk of the extent, as reading will.
void require_chunks(const DatasetPlace& place, hid_t creation, const SourceFiles& files) {
  const std::vector<hsize_t> extents = extents_of(place.dataset);
  std::vector<hsize_t> chunk(extents.size());
  if (H5Pget_chunk(creation, static_cast<int>(chunk.size()), chunk.data()) != static_cast<int>(chunk.size())) {
    refuse_unreadable(place.what);
  }
  // HDF5 creates no such dataset, and of a chunk that decodes to less than its extent it hands out whatever lay in memory.
  const std::vector<hsize_t> most = extents_of(place.dataset, WhichExtents::largest);
  for (std::size_t axis = 0; axis < chunk.size(); ++axis) {
    ANNULUS_EXPECTS(chunk[axis] <= most[axis], "{} is damaged: its chunks are {}, and it can never be larger than {}", place.what,
                    shape_text(chunk), shape_text(most));
  }
  std::vector<hsize_t> corner(extents.size(), 0);
  constexpr std::int64_t kStep = 4096;
  for (std::int64_t number = 1;; ++number) {
    if (number % kStep == 0) { files.step(); }
    hsize_t bytes = 0;
    const bool found = H5Dget_chunk_storage_size(place.dataset, corner.data(), &bytes) >= 0;
    if (!found && innermost_hdf5_error().find("not allocated") == std::string::npos) { refuse_unreadable(place.what); }
    ANNULUS_EXPECTS(found && bytes > 0, "{}: its chunk at {} was never written", place.what, shape_text(corner));
    std::size_t axis = extents.size();
    while (axis > 0 && (corner[axis - 1] += chunk[axis - 1]) >= extents[axis - 1]) { corner[--axis] = 0; }
    if (axis > 0) { continue; }
    require_plain_lengths(place, creation, chunk, number);
    return;
  }
}

}  // namespace

std::vector<hsize_t> extents_of(hid_t dataset, WhichExtents which) {
  const Hdf5Handle space(check_h5(H5Dget_space(dataset), "H5Dget_space"));
  const int rank = check_h5(H5Sget_simple_extent_ndims(space.get()), "H5Sget_simple_extent_ndims");
  std::vector<hsize_t> extents(static_cast<std::size_t>(rank));
  const bool largest = which == WhichExtents::largest;
  if (rank > 0) {
    check_h5(H5Sget_simple_extent_dims(space.get(), largest ? nullptr : extents.data(), largest ? extents.data() : nullptr),
             "H5Sget_simple_extent_dims");
  }
  return extents;
}

std::string shape_text(const std::vector<hsize_t>& extents) { return fmt::format("[{}]", fmt::join(extents, ", ")); }

void require_complete(const DatasetPlace& place, SourceFiles& files) {
  const Hdf5Handle creation(H5Dget_create_plist(place.dataset));
  if (!creation) { refuse_unreadable(place.what); }
  require_filters(place, creation.get());
  switch (H5Pget_layout(creation.get())) {
    case H5D_COMPACT:
      require_size(place);
      return;
    case H5D_CONTIGUOUS:
      require_contiguous(place, creation.get(), files);
      require_size(place);
      return;
    case H5D_CHUNKED:
      require_chunks(place, creation.get(), files);
      return;
    case H5D_VIRTUAL:
      require_complete_parts(place, creation.get(), files);
      return;
    case H5D_LAYOUT_ERROR:
    case H5D_NLAYOUTS:
      break;
  }
  refuse_unreadable(place.what);
}

OpenedDataset open_dataset(const std::string& what, std::shared_ptr<const ReadableFile> file, const std::string& path,
                           const std::string& name, SourceFiles& files) {
  std::string file_path = path;
  std::string target = name;
  for (int links = 0; links < kMostLinks; ++links) {
    // The link first: HDF5 calls it an error to ask whether the object behind a missing link exists.
    if (H5Lexists(file->get(), target.c_str(), H5P_DEFAULT) <= 0) { return {}; }
    H5L_info_t link{};
    if (H5Lget_info(file->get(), target.c_str(), &link, H5P_DEFAULT) < 0) { refuse_unreadable(what); }
    if (link.type != H5L_TYPE_EXTERNAL) {
      if (H5Oexists_by_name(file->get(), target.c_str(), H5P_DEFAULT) <= 0) { return {}; }
      OpenedDataset opened{file, Hdf5Handle(H5Oopen(file->get(), target.c_str(), H5P_DEFAULT)), file_path};
      if (!opened.dataset) { refuse_unreadable(what); }
      ANNULUS_EXPECTS(H5Iget_type(opened.dataset.get()) == H5I_DATASET, "{} is not a dataset", what);
      return opened;
    }
    std::vector<char> value(link.u.val_size + 1, '\0');
    const char* file_name = nullptr;
    const char* object = nullptr;
    if (H5Lget_val(file->get(), target.c_str(), value.data(), link.u.val_size, H5P_DEFAULT) < 0 ||
        H5Lunpack_elink_val(value.data(), link.u.val_size, nullptr, &file_name, &object) < 0) {
      refuse_unreadable(what);
    }
    file_path = SourceFiles::find(what, SourceKind::external_link, file_path, file_name);
    file = files.open(fmt::format("{}, a link to file '{}',", what, file_path), file_path);
    target = object;
  }
  throw InvalidArgument(fmt::format("{} is behind more than {} external links", what, kMostLinks));
}

}  // namespace annulus
