// SPDX-License-Identifier: Apache-2.0
// Which elements of a part are which elements of a virtual dataset. HDF5 pairs the selected elements of both in C order, whatever their
// shapes; where both selections are products of axes that is arithmetic on indices.
#pragma once

#include "box_reader.hpp"

#include <optional>
#include <string>
#include <vector>

namespace annulus {

/// Selected indices index, index + 1, .. of an axis, `count` of them, lie at first, first + step, ...
struct AxisRun {
  hsize_t first = 0;
  hsize_t step = 1;
  hsize_t count = 0;
  hsize_t index = 0;
};

/// What is selected along one axis, ascending.
struct SelectedAxis {
  std::vector<AxisRun> runs;
  hsize_t count = 0;
};

/// The product of its axes.
using Selection = std::vector<SelectedAxis>;

/// Runs of a selection along an axis, and blocks of an irregular one, that are looked at; more is no layout that anybody writes.
inline constexpr hssize_t kMostSelectedBlocks = hssize_t{1} << 20;

/// The selection of a dataspace over a dataset of these extents.
/// @return nothing if it is no product of axes, or of more runs than are looked at
std::optional<Selection> selection_of(hid_t space, const std::vector<hsize_t>& extents);

/// Where the elements of one part lie in a virtual dataset.
class VirtualMapping {
 public:
  /// Both with equally many elements.
  VirtualMapping(Selection whole, Selection part);

  hsize_t elements() const;
  /// Appends what is taken from the part for `wanted` of the whole, whose steps are 1.
  void add_slabs(const SlabCopy& wanted, std::vector<SlabCopy>& slabs) const;
  /// Where a part's chunks lie along the axes of the whole, of those that are an axis of the part, in one piece or with a step.
  std::vector<std::vector<ChunkGrid>> spread(const std::vector<std::vector<ChunkGrid>>& part_grids) const;
  /// The extents, along the axes of the whole, that a box of the part takes there.
  std::vector<hsize_t> spread(const std::vector<hsize_t>& part_extents) const;

 private:
  /// Neighbouring axes of both with equally many elements.
  struct Group {
    std::vector<std::size_t> whole;
    std::vector<std::size_t> part;
  };

  Selection whole_;
  Selection part_;
  std::vector<Group> groups_;
};

}  // namespace annulus
