// SPDX-License-Identifier: Apache-2.0
#include "box_reader.hpp"

#include <annulus/core/error.hpp>

#include "chunk_reader.hpp"
#include "hdf5_open.hpp"
#include "virtual_reader.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace annulus {

namespace {

/// Bytes that pass through memory of the reader's own at a time.
constexpr hsize_t kScratchBytes = hsize_t{8} << 20U;

/// Strides of an array of these extents in C order.
std::vector<hsize_t> strides_in_order(const std::vector<hsize_t>& extents) {
  std::vector<hsize_t> strides(extents.size());
  hsize_t elements = 1;
  for (std::size_t axis = extents.size(); axis-- > 0;) {
    strides[axis] = elements;
    elements *= extents[axis];
  }
  return strides;
}

/// Copies one element; sizes that are known let the compiler do without a call.
void copy_element(std::size_t size, ByteOrder order, const std::byte* from, std::byte* to) {
  if (order == ByteOrder::swapped) {
    std::reverse_copy(from, from + size, to);
  } else if (size == 2) {
    std::memcpy(to, from, 2);
  } else if (size == 4) {
    std::memcpy(to, from, 4);
  } else {
    std::memcpy(to, from, size);
  }
}

/// Values that no filter decodes: HDF5 itself reads them.
class PlainReader final : public BoxReader {
 public:
  PlainReader(const DatasetPlace& place, ByteOrder order)
      : dataset_(place.dataset),
        what_(place.what),
        order_(order),
        type_(check_h5(H5Dget_type(dataset_), "H5Dget_type")),
        size_(H5Tget_size(type_.get())),
        space_(check_h5(H5Dget_space(dataset_), "H5Dget_space")) {}

  void read(std::span<const SlabCopy> slabs, void* out) override {
    std::vector<const SlabCopy*> elements;
    for (const SlabCopy& slab : slabs) {
      const bool single = std::all_of(slab.count.begin(), slab.count.end(), [](hsize_t count) { return count == 1; });
      if (single && !slab.count.empty()) {
        elements.push_back(&slab);
      } else {
        read_slab(slab, static_cast<std::byte*>(out));
      }
    }
    if (!elements.empty()) { read_elements(elements, static_cast<std::byte*>(out)); }
  }

 private:
  void read_slab(const SlabCopy& slab, std::byte* out) {
    hsize_t elements = 1;
    for (const hsize_t count : slab.count) { elements *= count; }
    const std::vector<hsize_t> in_order = strides_in_order(slab.count);
    std::byte* target = out + slab.offset * size_;
    bool direct = order_ == ByteOrder::as_stored;
    for (std::size_t axis = 0; axis < slab.count.size(); ++axis) {
      direct = direct && (slab.count[axis] == 1 || slab.stride[axis] == in_order[axis]);
    }
    if (direct) {
      read_in_order(slab, target);
      return;
    }
    const auto widest = static_cast<std::size_t>(std::max_element(slab.count.begin(), slab.count.end()) - slab.count.begin());
    if (elements * size_ > kScratchBytes && slab.count[widest] > 1) {
      SlabCopy half = slab;
      half.count[widest] /= 2;
      read_slab(half, out);
      half.start[widest] += half.count[widest] * half.step[widest];
      half.offset += half.count[widest] * half.stride[widest];
      half.count[widest] = slab.count[widest] - half.count[widest];
      read_slab(half, out);
      return;
    }
    std::vector<std::byte> scratch(elements * size_);
    read_in_order(slab, scratch.data());
    copy_strided(size_, order_, slab.count, in_order, scratch.data(), slab.stride, target);
  }

  /// All that are read one by one, in one call.
  void read_elements(const std::vector<const SlabCopy*>& slabs, std::byte* out) {
    std::vector<hsize_t> coordinates;
    for (const SlabCopy* slab : slabs) { coordinates.insert(coordinates.end(), slab->start.begin(), slab->start.end()); }
    check_h5(H5Sselect_elements(space_.get(), H5S_SELECT_SET, slabs.size(), coordinates.data()), "H5Sselect_elements");
    std::vector<std::byte> scratch(slabs.size() * size_);
    read_selected({static_cast<hsize_t>(slabs.size())}, slabs.front()->start, scratch.data());
    for (std::size_t index = 0; index < slabs.size(); ++index) {
      copy_element(size_, order_, scratch.data() + index * size_, out + slabs[index]->offset * size_);
    }
  }

  void read_in_order(const SlabCopy& slab, void* out) {
    if (!slab.start.empty()) {
      check_h5(H5Sselect_hyperslab(space_.get(), H5S_SELECT_SET, slab.start.data(), slab.step.data(), slab.count.data(), nullptr),
               "H5Sselect_hyperslab");
    }
    // Of chunks HDF5 copies element by element where memory has another number of axes.
    read_selected(slab.count, slab.start, out);
  }

  /// Reads what is selected into memory of these extents.
  void read_selected(const std::vector<hsize_t>& extents, const std::vector<hsize_t>& start, void* out) {
    const Hdf5Handle memory(
        check_h5(extents.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr),
                 "H5Screate_simple"));
    if (H5Dread(dataset_, type_.get(), memory.get(), space_.get(), H5P_DEFAULT, out) < 0) {
      refuse_unreadable(fmt::format("{} at {}", what_, shape_text(start)));
    }
  }

  hid_t dataset_;
  std::string what_;
  ByteOrder order_;
  Hdf5Handle type_;
  std::size_t size_;
  Hdf5Handle space_;
};

}  // namespace

SlabCopy box_in_order(std::vector<hsize_t> start, std::vector<hsize_t> extent, hsize_t offset) {
  SlabCopy slab;
  slab.start = std::move(start);
  slab.step.assign(extent.size(), 1);
  slab.stride = strides_in_order(extent);
  slab.count = std::move(extent);
  slab.offset = offset;
  return slab;
}

void copy_strided(std::size_t size, ByteOrder order, std::vector<hsize_t> count, std::vector<hsize_t> from_stride, const std::byte* from,
                  std::vector<hsize_t> to_stride, std::byte* to) {
  // Axes that lie in one another in both arrays are one.
  std::size_t axes = 0;
  for (std::size_t axis = 0; axis < count.size(); ++axis) {
    if (count[axis] == 0) { return; }
    if (count[axis] == 1) { continue; }
    const bool joins =
        axes > 0 && from_stride[axes - 1] == from_stride[axis] * count[axis] && to_stride[axes - 1] == to_stride[axis] * count[axis];
    const std::size_t place = joins ? axes - 1 : axes++;
    count[place] = joins ? count[place] * count[axis] : count[axis];
    from_stride[place] = from_stride[axis];
    to_stride[place] = to_stride[axis];
  }
  if (axes == 0) {
    copy_element(size, order, from, to);
    return;
  }
  const std::size_t last = axes - 1;
  const bool together = order == ByteOrder::as_stored && from_stride[last] == 1 && to_stride[last] == 1;
  std::vector<hsize_t> index(axes, 0);
  hsize_t from_place = 0;
  hsize_t to_place = 0;
  for (;;) {
    if (together) {
      std::memcpy(to + to_place * size, from + from_place * size, count[last] * size);
    } else {
      for (hsize_t element = 0; element < count[last]; ++element) {
        copy_element(size, order, from + (from_place + element * from_stride[last]) * size,
                     to + (to_place + element * to_stride[last]) * size);
      }
    }
    std::size_t axis = last;
    while (axis > 0) {
      --axis;
      from_place += from_stride[axis];
      to_place += to_stride[axis];
      if (++index[axis] < count[axis]) { break; }
      from_place -= from_stride[axis] * count[axis];
      to_place -= to_stride[axis] * count[axis];
      index[axis] = 0;
      if (axis == 0) { return; }
    }
    if (last == 0) { return; }
  }
}

H5T_order_t byte_order_of(hid_t dataset) {
  const Hdf5Handle type(check_h5(H5Dget_type(dataset), "H5Dget_type"));
  return H5Tget_order(type.get());
}

std::unique_ptr<BoxReader> make_box_reader(const DatasetPlace& place, H5T_order_t order, SourceFiles& files) {
  const Hdf5Handle creation(check_h5(H5Dget_create_plist(place.dataset), "H5Dget_create_plist"));
  const H5D_layout_t layout = H5Pget_layout(creation.get());
  if (layout == H5D_VIRTUAL) { return std::make_unique<VirtualReader>(place, creation.get(), order, files); }
  const ByteOrder bytes = byte_order_of(place.dataset) == order ? ByteOrder::as_stored : ByteOrder::swapped;
  if (layout == H5D_CHUNKED && check_h5(H5Pget_nfilters(creation.get()), "H5Pget_nfilters") > 0) {
    return std::make_unique<ChunkReader>(place.dataset, place.what, bytes);
  }
  return std::make_unique<PlainReader>(place, bytes);
}

}  // namespace annulus
