// SPDX-License-Identifier: Apache-2.0
#include "virtual_mapping.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <utility>

namespace annulus {

namespace {

void add_run(SelectedAxis& axis, hsize_t first, hsize_t step, hsize_t count) {
  axis.runs.push_back({first, step, count, axis.count});
  axis.count += count;
}

std::optional<Selection> regular_selection(hid_t space, std::size_t rank) {
  std::vector<hsize_t> start(rank);
  std::vector<hsize_t> stride(rank);
  std::vector<hsize_t> count(rank);
  std::vector<hsize_t> block(rank);
  check_h5(H5Sget_regular_hyperslab(space, start.data(), stride.data(), count.data(), block.data()), "H5Sget_regular_hyperslab");
  Selection selection(rank);
  for (std::size_t axis = 0; axis < rank; ++axis) {
    if (count[axis] == 1 || block[axis] == stride[axis]) {
      add_run(selection[axis], start[axis], 1, count[axis] * block[axis]);
    } else if (block[axis] == 1) {
      add_run(selection[axis], start[axis], stride[axis], count[axis]);
    } else {
      if (count[axis] > static_cast<hsize_t>(kMostSelectedBlocks)) { return std::nullopt; }
      for (hsize_t number = 0; number < count[axis]; ++number) {
        add_run(selection[axis], start[axis] + number * stride[axis], 1, block[axis]);
      }
    }
  }
  return selection;
}

/// Blocks that are disjoint are a product if their sides along each axis are, and there are as many elements.
std::optional<Selection> irregular_selection(hid_t space, std::size_t rank) {
  const auto count = check_h5(static_cast<std::int64_t>(H5Sget_select_hyper_nblocks(space)), "H5Sget_select_hyper_nblocks");
  if (count > kMostSelectedBlocks) { return std::nullopt; }
  std::vector<hsize_t> corners(static_cast<std::size_t>(count) * 2 * rank);
  check_h5(H5Sget_select_hyper_blocklist(space, 0, static_cast<hsize_t>(count), corners.data()), "H5Sget_select_hyper_blocklist");
  Selection selection(rank);
  hssize_t elements = 1;
  for (std::size_t axis = 0; axis < rank; ++axis) {
    std::vector<std::pair<hsize_t, hsize_t>> sides;
    for (std::size_t block = 0; block < static_cast<std::size_t>(count); ++block) {
      sides.emplace_back(corners[2 * block * rank + axis], corners[(2 * block + 1) * rank + axis]);
    }
    std::sort(sides.begin(), sides.end());
    sides.erase(std::unique(sides.begin(), sides.end()), sides.end());
    for (std::size_t side = 0; side < sides.size(); ++side) {
      if (side > 0 && sides[side].first <= sides[side - 1].second) { return std::nullopt; }
      add_run(selection[axis], sides[side].first, 1, sides[side].second - sides[side].first + 1);
    }
    elements *= static_cast<hssize_t>(selection[axis].count);
  }
  if (elements != H5Sget_select_npoints(space)) { return std::nullopt; }
  return selection;
}

/// Indices of a group of axes, counted in C order, that are evenly apart in memory.
struct IndexRun {
  hsize_t first = 0;
  hsize_t count = 0;
  hsize_t offset = 0;
  hsize_t stride = 0;
};

/// The run that holds selected index `index`.
std::vector<AxisRun>::const_iterator run_of(const SelectedAxis& axis, hsize_t index) {
  return std::prev(
      std::upper_bound(axis.runs.begin(), axis.runs.end(), index, [](hsize_t value, const AxisRun& run) { return value < run.index; }));
}

/// Which of an axis' selected indices lie in `wanted`.
std::vector<IndexRun> wanted_indices(const SelectedAxis& axis, hsize_t start, hsize_t count, hsize_t stride) {
  std::vector<IndexRun> indices;
  const auto last_of = [](const AxisRun& run) { return run.first + (run.count - 1) * run.step; };
  auto run = std::partition_point(axis.runs.begin(), axis.runs.end(), [&](const AxisRun& own) { return last_of(own) < start; });
  for (; run != axis.runs.end() && run->first < start + count; ++run) {
    const hsize_t begin = run->first < start ? (start - run->first + run->step - 1) / run->step : 0;
    const hsize_t end = std::min(run->count, (start + count - 1 - run->first) / run->step + 1);
    if (begin >= end) { continue; }
    indices.push_back({run->index + begin, end - begin, (run->first + begin * run->step - start) * stride, run->step * stride});
  }
  return indices;
}

/// Indices of an axis and of those behind it, counted together. `inner_count` is how many those select.
std::vector<IndexRun> joined(const std::vector<IndexRun>& outer, const std::vector<IndexRun>& inner, hsize_t inner_count) {
  std::vector<IndexRun> all;
  const bool whole = inner.size() == 1 && inner.front().count == inner_count;
  for (const IndexRun& own : outer) {
    if (whole && (own.count == 1 || own.stride == inner.front().stride * inner_count)) {
      all.push_back({own.first * inner_count, own.count * inner_count, own.offset + inner.front().offset, inner.front().stride});
      continue;
    }
    for (hsize_t index = 0; index < own.count; ++index) {
      for (const IndexRun& behind : inner) {
        all.push_back({(own.first + index) * inner_count + behind.first, behind.count, own.offset + index * own.stride + behind.offset,
                       behind.stride});
      }
    }
  }
  return all;
}

/// What a slab takes along the axes of one group.
struct GroupSlab {
  std::vector<hsize_t> start;
  std::vector<hsize_t> step;
  std::vector<hsize_t> count;
  std::vector<hsize_t> stride;
  hsize_t offset = 0;
};

/// Cuts indices of the axes from `axis` on, counted in C order, into slabs. `begun` is the slab along the axes before.
void add_group_slabs(const Selection& part, const std::vector<std::size_t>& axes, std::size_t axis, const GroupSlab& begun,
                     IndexRun indices, std::vector<GroupSlab>& slabs) {
  const SelectedAxis& own = part[axes[axis]];
  hsize_t inner = 1;
  for (std::size_t behind = axis + 1; behind < axes.size(); ++behind) { inner *= part[axes[behind]].count; }
  while (indices.count > 0) {
    const hsize_t index = indices.first / inner;
    const hsize_t behind = indices.first % inner;
    const auto run = run_of(own, index);
    const bool whole = behind == 0 && indices.count >= inner;
    const hsize_t along = whole ? std::min(run->index + run->count - index, indices.count / inner) : 1;
    const hsize_t taken = whole ? along * inner : std::min(indices.count, inner - behind);
    GroupSlab slab = begun;
    slab.start.push_back(run->first + (index - run->index) * run->step);
    slab.step.push_back(run->step);
    slab.count.push_back(along);
    slab.stride.push_back(inner * indices.stride);
    if (axis + 1 == axes.size()) {
      slab.offset = indices.offset;
      slabs.push_back(std::move(slab));
    } else {
      add_group_slabs(part, axes, axis + 1, slab, {behind, whole ? inner : taken, indices.offset, indices.stride}, slabs);
    }
    indices.first += taken;
    indices.count -= taken;
    indices.offset += taken * indices.stride;
  }
}

/// Axes of which more than one index is selected.
std::vector<std::size_t> long_axes(const Selection& selection) {
  std::vector<std::size_t> axes;
  for (std::size_t axis = 0; axis < selection.size(); ++axis) {
    if (selection[axis].count > 1) { axes.push_back(axis); }
  }
  return axes;
}

/// Elements of a selection along these axes.
hsize_t elements_of(const Selection& selection, const std::vector<std::size_t>& axes) {
  hsize_t elements = 1;
  for (const std::size_t axis : axes) { elements *= selection[axis].count; }
  return elements;
}

hsize_t rounded_up(hsize_t dividend, hsize_t divisor) { return dividend / divisor + (dividend % divisor == 0 ? 0 : 1); }

}  // namespace

std::optional<Selection> selection_of(hid_t space, const std::vector<hsize_t>& extents) {
  const std::size_t rank = extents.size();
  const H5S_sel_type type = H5Sget_select_type(space);
  if (type == H5S_SEL_ALL) {
    Selection selection(rank);
    for (std::size_t axis = 0; axis < rank; ++axis) { add_run(selection[axis], 0, 1, extents[axis]); }
    return selection;
  }
  if (type != H5S_SEL_HYPERSLABS) { return std::nullopt; }
  return H5Sis_regular_hyperslab(space) > 0 ? regular_selection(space, rank) : irregular_selection(space, rank);
}

VirtualMapping::VirtualMapping(Selection whole, Selection part) : whole_(std::move(whole)), part_(std::move(part)) {
  const std::vector<std::size_t> whole_axes = long_axes(whole_);
  const std::vector<std::size_t> part_axes = long_axes(part_);
  ANNULUS_ASSERT(elements_of(whole_, whole_axes) == elements_of(part_, part_axes), "{} elements of {}", elements_of(whole_, whole_axes),
                 elements_of(part_, part_axes));
  auto of_whole = whole_axes.begin();
  auto of_part = part_axes.begin();
  while (of_whole != whole_axes.end()) {
    Group& group = groups_.emplace_back();
    hsize_t elements_of_whole = 1;
    hsize_t elements_of_part = 1;
    do {
      const bool from_whole = elements_of_whole == 1 || elements_of_whole < elements_of_part;
      hsize_t& elements = from_whole ? elements_of_whole : elements_of_part;
      const std::size_t axis = from_whole ? *of_whole++ : *of_part++;
      elements *= (from_whole ? whole_ : part_)[axis].count;
      (from_whole ? group.whole : group.part).push_back(axis);
    } while (elements_of_whole != elements_of_part);
  }
}

hsize_t VirtualMapping::elements() const { return elements_of(whole_, long_axes(whole_)); }

void VirtualMapping::add_slabs(const SlabCopy& wanted, std::vector<SlabCopy>& slabs) const {
  SlabCopy common;
  common.offset = wanted.offset;
  for (const SelectedAxis& axis : part_) { common.start.push_back(axis.runs.front().first); }
  common.step.assign(part_.size(), 1);
  common.count.assign(part_.size(), 1);
  common.stride.assign(part_.size(), 0);
  std::vector<std::vector<IndexRun>> indices(whole_.size());
  for (std::size_t axis = 0; axis < whole_.size(); ++axis) {
    indices[axis] = wanted_indices(whole_[axis], wanted.start[axis], wanted.count[axis], wanted.stride[axis]);
    if (indices[axis].empty()) { return; }
    if (whole_[axis].count == 1) { common.offset += indices[axis].front().offset; }
  }
  std::vector<std::vector<GroupSlab>> along(groups_.size());
  for (std::size_t number = 0; number < groups_.size(); ++number) {
    const Group& group = groups_[number];
    std::vector<IndexRun> of_group = indices[group.whole.back()];
    hsize_t inner = whole_[group.whole.back()].count;
    for (std::size_t axis = group.whole.size() - 1; axis-- > 0;) {
      of_group = joined(indices[group.whole[axis]], of_group, inner);
      inner *= whole_[group.whole[axis]].count;
    }
    for (const IndexRun& run : of_group) { add_group_slabs(part_, group.part, 0, {}, run, along[number]); }
  }
  // Every slab of a group with every one of the others.
  std::vector<std::size_t> chosen(groups_.size(), 0);
  for (bool more = true; more;) {
    SlabCopy& slab = slabs.emplace_back(common);
    for (std::size_t number = 0; number < groups_.size(); ++number) {
      const GroupSlab& own = along[number][chosen[number]];
      slab.offset += own.offset;
      for (std::size_t index = 0; index < own.start.size(); ++index) {
        const std::size_t axis = groups_[number].part[index];
        slab.start[axis] = own.start[index];
        slab.step[axis] = own.count[index] == 1 ? 1 : own.step[index];
        slab.count[axis] = own.count[index];
        slab.stride[axis] = own.stride[index];
      }
    }
    more = false;
    for (std::size_t number = groups_.size(); number-- > 0 && !more;) {
      more = ++chosen[number] < along[number].size();
      if (!more) { chosen[number] = 0; }
    }
  }
}

std::vector<hsize_t> VirtualMapping::spread(const std::vector<hsize_t>& part_extents) const {
  std::vector<hsize_t> extents(whole_.size(), 1);
  for (const Group& group : groups_) {
    // Indices in C order, from the first to the last that the box holds.
    hsize_t behind = elements_of(part_, group.part);
    hsize_t indices = 1;
    for (const std::size_t axis : group.part) {
      behind /= part_[axis].count;
      const hsize_t own = std::min(part_[axis].count, rounded_up(part_extents[axis], part_[axis].runs.front().step));
      indices = own * behind;
      if (own > 1) { break; }
    }
    for (std::size_t number = group.whole.size(); number-- > 0;) {
      const SelectedAxis& axis = whole_[group.whole[number]];
      const AxisRun& last = axis.runs.back();
      const hsize_t span = last.first + (last.count - 1) * last.step + 1 - axis.runs.front().first;
      const hsize_t own = std::min(axis.count, indices);
      extents[group.whole[number]] = own == axis.count ? span : own * rounded_up(span, axis.count);
      indices = rounded_up(indices, axis.count);
    }
  }
  return extents;
}

std::vector<std::vector<ChunkGrid>> VirtualMapping::spread(const std::vector<std::vector<ChunkGrid>>& part_grids) const {
  std::vector<std::vector<ChunkGrid>> grids(whole_.size());
  for (const Group& group : groups_) {
    const SelectedAxis& whole = whole_[group.whole.front()];
    const SelectedAxis& part = part_[group.part.front()];
    const bool alone = group.whole.size() == 1 && group.part.size() == 1 && whole.runs.size() == 1 && part.runs.size() == 1;
    if (!alone || part.runs.front().step != 1) { continue; }
    const auto step = static_cast<std::int64_t>(whole.runs.front().step);
    const auto first = static_cast<std::int64_t>(part.runs.front().first);
    const auto end = first + static_cast<std::int64_t>(part.count);
    const auto to_whole = [&](std::int64_t index) { return static_cast<std::int64_t>(whole.runs.front().first) + (index - first) * step; };
    for (const ChunkGrid& own : part_grids[group.part.front()]) {
      const std::int64_t begin = std::max(own.begin, first);
      const std::int64_t last = std::min(own.end, end) - 1;
      if (begin > last) { continue; }
      grids[group.whole.front()].push_back({to_whole(begin), to_whole(last) + 1, own.chunk * step, to_whole(own.phase), own.step * step});
    }
  }
  return grids;
}

}  // namespace annulus
