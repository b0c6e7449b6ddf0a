// SPDX-License-Identifier: Apache-2.0
#include "virtual_layout.hpp"

#include <annulus/core/error.hpp>

#include "hdf5_open.hpp"
#include "hdf5_types.hpp"

#include <algorithm>
#include <cstddef>
#include <set>
#include <utility>

namespace annulus {

namespace {

/// Virtual layouts of virtual layouts; more is taken for a circle.
constexpr int kMostDepth = 8;
/// Cells between the corners of blocks that are looked at; more is no layout that anybody writes.
constexpr std::size_t kMostCells = std::size_t{1} << 26;

/// A box of the virtual dataset: corners, both inside.
struct Block {
  std::vector<hsize_t> first;
  std::vector<hsize_t> last;
};

using TextGetter = ssize_t (*)(hid_t, std::size_t, char*, std::size_t);

std::string text_of(TextGetter get, hid_t creation, std::size_t index, const std::string& what) {
  const ssize_t length = get(creation, index, nullptr, 0);
  if (length < 0) { refuse_unreadable(what); }
  std::string text(static_cast<std::size_t>(length) + 1, '\0');
  if (get(creation, index, text.data(), text.size()) < 0) { refuse_unreadable(what); }
  text.resize(static_cast<std::size_t>(length));
  return text;
}

/// Whether a selection grows with its dataset: what it covers then depends on what exists.
bool is_unlimited(hid_t space, std::size_t rank) {
  if (H5Sget_select_type(space) != H5S_SEL_HYPERSLABS || H5Sis_regular_hyperslab(space) <= 0) { return false; }
  std::vector<hsize_t> start(rank);
  std::vector<hsize_t> stride(rank);
  std::vector<hsize_t> count(rank);
  std::vector<hsize_t> block(rank);
  if (H5Sget_regular_hyperslab(space, start.data(), stride.data(), count.data(), block.data()) < 0) { return true; }
  const auto unlimited = [](hsize_t value) { return value == H5S_UNLIMITED; };
  return std::any_of(count.begin(), count.end(), unlimited) || std::any_of(block.begin(), block.end(), unlimited);
}

void add_blocks(hid_t space, const std::vector<hsize_t>& extents, const std::string& what, std::vector<Block>& blocks) {
  const std::size_t rank = extents.size();
  if (H5Sget_select_type(space) == H5S_SEL_ALL) {
    Block whole{std::vector<hsize_t>(rank, 0), extents};
    for (hsize_t& last : whole.last) { --last; }
    blocks.push_back(std::move(whole));
    return;
  }
  const hssize_t count = H5Sget_select_hyper_nblocks(space);
  if (count < 0) { refuse_unreadable(what); }
  ANNULUS_EXPECTS(count <= kMostSelectedBlocks && std::ssize(blocks) + count <= kMostSelectedBlocks,
                  "{} is a virtual dataset of more than {} blocks; copy it into one dataset", what, kMostSelectedBlocks);
  std::vector<hsize_t> corners(static_cast<std::size_t>(count) * 2 * rank);
  if (H5Sget_select_hyper_blocklist(space, 0, static_cast<hsize_t>(count), corners.data()) < 0) { refuse_unreadable(what); }
  for (auto corner = corners.begin(); corner != corners.end();) {
    Block block;
    for (std::vector<hsize_t>* side : {&block.first, &block.last}) {
      side->assign(corner, corner + static_cast<std::ptrdiff_t>(rank));
      corner += static_cast<std::ptrdiff_t>(rank);
    }
    blocks.push_back(std::move(block));
  }
}

/// Requires that the blocks cover the extents, by marking the cells between all their corners.
void require_covered(const std::vector<Block>& blocks, const std::vector<hsize_t>& extents, const std::string& what) {
  const std::size_t rank = extents.size();
  std::vector<std::vector<hsize_t>> edges(rank);
  std::size_t cells = 1;
  for (std::size_t axis = 0; axis < rank; ++axis) {
    std::vector<hsize_t>& own = edges[axis];
    own = {0, extents[axis]};
    for (const Block& block : blocks) {
      own.push_back(std::min(block.first[axis], extents[axis]));
      own.push_back(std::min(block.last[axis] + 1, extents[axis]));
    }
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
    ANNULUS_EXPECTS(own.size() - 1 <= kMostCells / cells, "{} is a virtual dataset of too irregular parts; copy it into one dataset", what);
    cells *= own.size() - 1;
  }
  std::vector<bool> covered(cells, false);
  std::vector<std::size_t> cell(rank);
  const auto index_of = [&] {
    std::size_t index = 0;
    for (std::size_t axis = 0; axis < rank; ++axis) { index = index * (edges[axis].size() - 1) + cell[axis]; }
    return index;
  };
  for (const Block& block : blocks) {
    std::vector<std::size_t> begin(rank);
    std::vector<std::size_t> end(rank);
    bool empty = false;
    for (std::size_t axis = 0; axis < rank; ++axis) {
      const auto place = [&](hsize_t edge) {
        const auto found = std::lower_bound(edges[axis].begin(), edges[axis].end(), std::min(edge, extents[axis]));
        return static_cast<std::size_t>(found - edges[axis].begin());
      };
      begin[axis] = place(block.first[axis]);
      end[axis] = place(block.last[axis] + 1);
      empty = empty || begin[axis] >= end[axis];
    }
    if (empty) { continue; }
    cell = begin;
    for (std::size_t axis = rank; axis > 0;) {
      covered[index_of()] = true;
      axis = rank;
      while (axis > 0 && ++cell[axis - 1] == end[axis - 1]) {
        cell[axis - 1] = begin[axis - 1];
        --axis;
      }
    }
  }
  const auto hole = std::find(covered.begin(), covered.end(), false);
  if (hole == covered.end()) { return; }
  auto index = static_cast<std::size_t>(hole - covered.begin());
  std::vector<hsize_t> corner(rank);
  for (std::size_t axis = rank; axis > 0; --axis) {
    const std::size_t width = edges[axis - 1].size() - 1;
    corner[axis - 1] = edges[axis - 1][index % width];
    index /= width;
  }
  throw InvalidArgument(fmt::format("{} is a virtual dataset, and no part of it holds the values from {} on", what, shape_text(corner)));
}

/// Whether both hold the same values but for the order of their bytes.
bool hold_the_same(hid_t type, hid_t other) {
  const auto dtype = recognise_dtype(type);
  const auto other_dtype = recognise_dtype(other);
  if (dtype || other_dtype) { return dtype && other_dtype && dtype->dtype == other_dtype->dtype; }
  if (H5Tget_class(type) != H5T_INTEGER || H5Tget_class(other) != H5T_INTEGER) { return false; }
  const Hdf5Handle one(check_h5(H5Tcopy(type), "H5Tcopy"));
  const Hdf5Handle two(check_h5(H5Tcopy(other), "H5Tcopy"));
  for (const hid_t own : {one.get(), two.get()}) { check_h5(H5Tset_order(own, H5T_ORDER_LE), "H5Tset_order"); }
  return H5Tequal(one.get(), two.get()) > 0;
}

/// File and name of datasets.
using DatasetNames = std::set<std::pair<std::string, std::string>>;

/// Requires that the source is there, of the dtype that is read, as large as what is taken from it, and complete; of those in `complete`
/// that is known.
void require_part(const DatasetPlace& place, hid_t creation, std::size_t index, hid_t taken_of_virtual, DatasetNames& complete,
                  SourceFiles& files) {
  const PartPlace found = find_part(place, creation, index);
  const std::string& what = found.what;
  const OpenedDataset part = open_part(found, files);

  const Hdf5Handle own_type(check_h5(H5Dget_type(place.dataset), "H5Dget_type"));
  const Hdf5Handle part_type(check_h5(H5Dget_type(part.dataset.get()), "H5Dget_type"));
  ANNULUS_EXPECTS(hold_the_same(part_type.get(), own_type.get()), "{} holds {} values and the whole {}; both must be the same", what,
                  describe_hdf5_type(part_type.get()), describe_hdf5_type(own_type.get()));

  const Hdf5Handle taken(H5Pget_virtual_srcspace(creation, index));
  if (!taken) { refuse_unreadable(place.what); }
  const std::vector<hsize_t> extents = extents_of(part.dataset.get());
  const std::size_t rank = extents.size();
  const hssize_t needed = H5Sget_select_npoints(taken_of_virtual);
  hssize_t offered = 0;
  bool fits = true;
  if (H5Sget_select_type(taken.get()) == H5S_SEL_ALL) {
    const Hdf5Handle all(check_h5(H5Dget_space(part.dataset.get()), "H5Dget_space"));
    offered = H5Sget_simple_extent_npoints(all.get());
  } else {
    fits = H5Sget_simple_extent_ndims(taken.get()) == static_cast<int>(rank) && !is_unlimited(taken.get(), rank);
    std::vector<hsize_t> first(rank);
    std::vector<hsize_t> last(rank);
    fits = fits && H5Sget_select_bounds(taken.get(), first.data(), last.data()) >= 0;
    for (std::size_t axis = 0; fits && axis < rank; ++axis) { fits = last[axis] < extents[axis]; }
    offered = H5Sget_select_npoints(taken.get());
  }
  ANNULUS_EXPECTS(fits && offered == needed, "{} is {}, which is not what the whole takes from it", what, shape_text(extents));
  mapping_of(place, creation, index, found, part.dataset.get());
  if (complete.contains({found.file, found.dataset})) { return; }
  require_complete({part.dataset.get(), part.file, what, found.depth}, files);
  complete.emplace(found.file, found.dataset);
}

}  // namespace

std::size_t count_parts(const DatasetPlace& place, hid_t creation) {
  std::size_t count = 0;
  if (H5Pget_virtual_count(creation, &count) < 0) { refuse_unreadable(place.what); }
  return count;
}

PartPlace find_part(const DatasetPlace& place, hid_t creation, std::size_t index) {
  const std::string file_name = text_of(H5Pget_virtual_filename, creation, index, place.what);
  PartPlace part;
  part.dataset = text_of(H5Pget_virtual_dsetname, creation, index, place.what);
  ANNULUS_EXPECTS(file_name.find('%') == std::string::npos && part.dataset.find('%') == std::string::npos,
                  "{} is a virtual dataset of numbered parts ('{}', '{}'), of which nothing tells whether all are there; copy it into one "
                  "dataset",
                  place.what, file_name, part.dataset);
  part.file = file_name == "." ? place.file
                               : SourceFiles::find(place.what + ", a virtual dataset,", SourceKind::virtual_source, place.file, file_name);
  part.what = fmt::format("{}: its part {} in file '{}'", place.what, part.dataset, part.file);
  part.depth = place.depth + 1;
  return part;
}

OpenedDataset open_part(const PartPlace& part, SourceFiles& files) {
  OpenedDataset opened = open_dataset(part.what, files.open(part.what, part.file), part.file, part.dataset, files);
  ANNULUS_EXPECTS(static_cast<bool>(opened.dataset), "{} is missing", part.what);
  return opened;
}

VirtualMapping mapping_of(const DatasetPlace& place, hid_t creation, std::size_t index, const PartPlace& part, hid_t part_dataset) {
  const Hdf5Handle of_whole(check_h5(H5Pget_virtual_vspace(creation, index), "H5Pget_virtual_vspace"));
  const Hdf5Handle of_part(check_h5(H5Pget_virtual_srcspace(creation, index), "H5Pget_virtual_srcspace"));
  std::optional<Selection> whole = selection_of(of_whole.get(), extents_of(place.dataset));
  std::optional<Selection> taken = selection_of(of_part.get(), extents_of(part_dataset));
  ANNULUS_EXPECTS(whole && taken, "{} is taken in pieces that no choice of indices along each axis gives; copy the whole into one dataset",
                  part.what);
  return {std::move(*whole), std::move(*taken)};
}

void require_complete_parts(const DatasetPlace& place, hid_t creation, SourceFiles& files) {
  ANNULUS_EXPECTS(place.depth < kMostDepth, "{} is a virtual dataset of virtual datasets, {} deep", place.what, kMostDepth);
  const std::vector<hsize_t> extents = extents_of(place.dataset);
  const std::size_t count = count_parts(place, creation);
  std::vector<Block> blocks;
  DatasetNames complete;
  for (std::size_t index = 0; index < count; ++index) {
    const Hdf5Handle space(H5Pget_virtual_vspace(creation, index));
    if (!space) { refuse_unreadable(place.what); }
    ANNULUS_EXPECTS(H5Sget_simple_extent_ndims(space.get()) == static_cast<int>(extents.size()),
                    "{} is damaged: a part of its virtual layout has {} dimensions", place.what, H5Sget_simple_extent_ndims(space.get()));
    ANNULUS_EXPECTS(
        !is_unlimited(space.get(), extents.size()),
        "{} is a virtual dataset that grows with its parts, of which nothing tells whether all are there; copy it into one dataset",
        place.what);
    add_blocks(space.get(), extents, place.what, blocks);
    require_part(place, creation, index, space.get(), complete, files);
    files.step();
  }
  require_covered(blocks, extents, place.what);
}

}  // namespace annulus
