// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/io/source.hpp>
#include <annulus/pattern/grid_cell.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace annulus {

/// A cell of a grid as a source of its own: batch entries and heads are numbered from the cell's first ones. Rows are read with all their
/// heads, a few at a time, unless the cell has them all.
class CellSource final : public SourceView {
 public:
  /// Both must outlive it.
  CellSource(const TensorSource& whole, const GridCell& cell) : SourceView(whole), cell_(cell) {}

  const Problem& problem() const override { return cell_.problem; }
  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override;
  std::optional<RowBands> bands(Tensor tensor) const override { return viewed().bands(tensor); }
  void release_buffers() const override;

  /// Bytes that it holds at most.
  static std::int64_t bytes(const Problem& whole, const GridCell& cell);

 private:
  const GridCell& cell_;
  mutable std::vector<std::byte> rows_;  ///< with all heads
};

}  // namespace annulus
