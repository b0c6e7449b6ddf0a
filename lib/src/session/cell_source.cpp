// SPDX-License-Identifier: Apache-2.0
#include "cell_source.hpp"

#include <algorithm>
#include <cstring>

namespace annulus {

namespace {

constexpr std::int64_t kMostBytes = std::int64_t{4} << 20;  // or a row, where it is longer

/// How many rows with all heads are held.
std::int64_t rows_at_a_time(std::int64_t row_bytes) { return std::max<std::int64_t>(1, kMostBytes / row_bytes); }

}  // namespace

void CellSource::read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const {
  const Problem& whole = viewed().problem();
  const std::int64_t entry = cell_.first_batch + batch;
  if (heads_of(cell_.problem, tensor) == heads_of(whole, tensor)) {
    viewed().read(tensor, entry, first, count, dtype, out);
    return;
  }
  const std::int64_t head_bytes = whole.head_dim * size_of(dtype);
  const std::int64_t whole_bytes = heads_of(whole, tensor) * head_bytes;
  const std::int64_t bytes = heads_of(cell_.problem, tensor) * head_bytes;
  const bool of_queries = tensor == Tensor::q || tensor == Tensor::dout;
  const std::int64_t before = (of_queries ? cell_.first_head : cell_.first_kv_head) * head_bytes;
  const std::int64_t most = std::min(count, rows_at_a_time(whole_bytes));
  rows_.resize(std::max(rows_.size(), static_cast<std::size_t>(most * whole_bytes)));
  auto* target = static_cast<std::byte*>(out);
  for (std::int64_t done = 0; done < count; done += most) {
    const std::int64_t part = std::min(most, count - done);
    viewed().read(tensor, entry, first + done, part, dtype, rows_.data());
    for (std::int64_t row = 0; row < part; ++row, target += bytes) {
      std::memcpy(target, rows_.data() + row * whole_bytes + before, static_cast<std::size_t>(bytes));
    }
  }
}

void CellSource::release_buffers() const {
  rows_ = {};
  viewed().release_buffers();
}

std::int64_t CellSource::bytes(const Problem& whole, const GridCell& cell) {
  if (cell.problem.heads == whole.heads) { return 0; }
  const std::int64_t bytes = row_bytes(whole, Tensor::q);  // no shorter than one of K and V
  return rows_at_a_time(bytes) * bytes;
}

}  // namespace annulus
