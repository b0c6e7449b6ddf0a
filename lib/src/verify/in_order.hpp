// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/list.hpp>
#include <annulus/io/source.hpp>

#include "order_table.hpp"

#include <cstdint>

namespace annulus {

/// A source whose rows are taken in another order.
class InOrder final : public SourceView {
 public:
  InOrder(const TensorSource& source, SequenceOrder order) : SourceView(source), rows_(order_table(order, source.problem().seq_len)) {}

  /// In the order in which they are stored, neighbours together: a file may have to decode much for each row that is asked for.
  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override;

 private:
  List<std::int64_t> rows_;  ///< at each position
};

}  // namespace annulus
