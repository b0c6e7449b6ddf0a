// SPDX-License-Identifier: Apache-2.0
#include "virtual_reader.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <functional>
#include <numeric>
#include <tuple>
#include <utility>

namespace annulus {

namespace {

/// A process may have 1,024 files open, two for each here, and Q, K and V may have parts in different ones.
constexpr std::size_t kMostOpenParts = 32;

/// The dataset that a part is.
std::tuple<const std::string&, const std::string&> of(const PartPlace& place) { return {place.file, place.dataset}; }

/// Adds a grid: most go on where the latest one ends, or are it again.
void unite(const ChunkGrid& grid, std::vector<ChunkGrid>& grids) {
  if (!grids.empty()) {
    ChunkGrid& latest = grids.back();
    const bool alike = latest.chunk == grid.chunk && latest.step == grid.step && (latest.phase - grid.phase) % grid.chunk == 0;
    if (alike && latest.begin == grid.begin && latest.end == grid.end) { return; }
    if (alike && latest.end == grid.begin && (grid.begin - grid.phase) % grid.chunk == 0) {
      latest.end = grid.end;
      return;
    }
  }
  grids.push_back(grid);
}

/// Slabs whose steps are 1, which hold the same.
std::vector<SlabCopy> without_steps(std::span<const SlabCopy> slabs) {
  std::vector<SlabCopy> all(slabs.begin(), slabs.end());
  for (std::size_t index = 0; index < all.size(); ++index) {
    for (std::size_t axis = 0; axis < all[index].step.size(); ++axis) {
      if (all[index].step[axis] == 1) { continue; }
      SlabCopy one = all[index];
      const hsize_t count = std::exchange(one.count[axis], 1);
      const hsize_t step = std::exchange(one.step[axis], 1);
      all[index] = one;
      for (hsize_t further = 1; further < count; ++further) {
        one.start[axis] += step;
        one.offset += one.stride[axis];
        all.push_back(one);
      }
    }
  }
  return all;
}

}  // namespace

std::shared_ptr<OpenParts::Part> OpenParts::get(const PartPlace& place) {
  auto found = std::find_if(latest_.begin(), latest_.end(), [&](const Entry& entry) { return of(entry.place) == of(place); });
  if (found == latest_.end()) {
    auto part = std::make_shared<Part>();
    part->dataset = open_part(place, files_);
    const hid_t dataset = part->dataset.dataset.get();
    const DatasetPlace opened{dataset, part->dataset.file, place.what, place.depth};
    const Hdf5Handle creation(check_h5(H5Dget_create_plist(dataset), "H5Dget_create_plist"));
    part->is_virtual = H5Pget_layout(creation.get()) == H5D_VIRTUAL;
    if (part->is_virtual) {
      part->reader = std::make_unique<VirtualReader>(opened, creation.get(), *this);
    } else {
      part->reader = make_box_reader(opened, order_, files_);
    }
    latest_.push_front({place, std::move(part)});
    if (latest_.size() > kMostOpenParts) { latest_.pop_back(); }
    found = latest_.begin();
  }
  latest_.splice(latest_.begin(), latest_, found);
  const std::shared_ptr<Part>& part = latest_.front().part;
  if (!part->is_virtual && part != buffers_) {
    release_buffers();
    buffers_ = part;
  }
  return part;
}

void OpenParts::release_buffers() {
  if (buffers_) { std::exchange(buffers_, nullptr)->reader->release_buffers(); }
}

VirtualReader::VirtualReader(const DatasetPlace& place, hid_t creation, H5T_order_t order, SourceFiles& files)
    : own_(std::make_unique<OpenParts>(order, files)), open_(*own_) {
  find_parts(place, creation);
}

VirtualReader::VirtualReader(const DatasetPlace& place, hid_t creation, OpenParts& open) : open_(open) { find_parts(place, creation); }

void VirtualReader::find_parts(const DatasetPlace& place, hid_t creation) {
  const std::size_t count = count_parts(place, creation);
  hsize_t elements = 0;
  for (std::size_t index = 0; index < count; ++index) {
    PartPlace part = find_part(place, creation, index);
    const std::shared_ptr<OpenParts::Part> opened = open_.get(part);
    VirtualMapping mapping = mapping_of(place, creation, index, part, opened->dataset.dataset.get());
    if (const auto unit = opened->reader->decoded_unit()) {
      const std::vector<hsize_t> own = mapping.spread(unit->extents);
      const std::vector<std::vector<ChunkGrid>> grids = mapping.spread(unit->grids);
      if (!unit_) { unit_ = DecodedUnit{std::vector<hsize_t>(own.size(), 1), 0, std::vector<std::vector<ChunkGrid>>(own.size())}; }
      for (std::size_t axis = 0; axis < own.size(); ++axis) { unit_->extents[axis] = std::max(unit_->extents[axis], own[axis]); }
      for (std::size_t axis = 0; axis < own.size(); ++axis) {
        for (const ChunkGrid& grid : grids[axis]) { unite(grid, unit_->grids[axis]); }
      }
      unit_->bytes = std::max(unit_->bytes, unit->bytes);
    }
    elements += mapping.elements();
    parts_.push_back({std::move(part), std::move(mapping)});
    open_.files().step();
  }
  const std::vector<hsize_t> extents = extents_of(place.dataset);
  overlap_ = elements != std::accumulate(extents.begin(), extents.end(), hsize_t{1}, std::multiplies<>());
  // What is taken from one part piece by piece is read together, so that its chunks are decoded once.
  if (!overlap_) {
    std::stable_sort(parts_.begin(), parts_.end(), [](const Part& a, const Part& b) { return of(a.place) < of(b.place); });
  }
}

void VirtualReader::read(std::span<const SlabCopy> slabs, void* out) {
  const std::vector<SlabCopy> wanted = without_steps(slabs);
  std::vector<SlabCopy> taken;
  // Of parts that overlap the last one in the layout is what is read, as HDF5 has it.
  for (auto part = parts_.begin(); part != parts_.end();) {
    const PartPlace& place = part->place;
    taken.clear();
    do {
      for (const SlabCopy& slab : wanted) { part->mapping.add_slabs(slab, taken); }
      ++part;
    } while (!overlap_ && part != parts_.end() && of(part->place) == of(place));
    if (!taken.empty()) { open_.get(place)->reader->read(taken, out); }
  }
}

}  // namespace annulus
