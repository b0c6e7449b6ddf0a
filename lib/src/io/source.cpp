// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/source.hpp>

#include <annulus/core/error.hpp>

#include "hdf5_types.hpp"

#include <algorithm>
#include <iterator>

namespace annulus {

RowBands::Band RowBands::band_at(std::int64_t row) const {
  const auto next = std::upper_bound(stretches.begin(), stretches.end(), row,
                                     [](std::int64_t value, const Stretch& stretch) { return value < stretch.first; });
  const Stretch& own = *std::prev(next);
  const std::int64_t end = next == stretches.end() ? seq_len : next->first;
  const std::int64_t first = own.first + (row - own.first) / own.rows * own.rows;
  return {first, std::min(own.rows, end - first), own.chunk_rows};
}

std::int64_t RowBands::bytes() const {
  std::int64_t rows = 0;
  for (const Stretch& stretch : stretches) { rows = std::max(rows, band_at(stretch.first).count); }
  return batches * rows * row_bytes;
}

std::span<const Tensor> tensors_of(const Problem& problem) {
  static constexpr std::array<Tensor, 5> kAll{Tensor::q, Tensor::k, Tensor::v, Tensor::k_extra, Tensor::v_extra};
  return std::span(kAll).first(problem.extra_keys > 0 ? kAll.size() : kSequenceTensors.size());
}

std::vector<Fingerprint> TensorSource::fingerprints(std::int64_t part, std::int64_t parts) const {
  std::vector<Fingerprint> all;
  for (const Tensor tensor : tensors_of(problem())) {
    all.push_back({fmt::format("values of {}", dataset_name(tensor)), fingerprint(tensor, part, parts)});
  }
  return all;
}

void TensorSource::read_box(Tensor /*tensor*/, const Box& /*box*/, void* /*out*/) const {
  ANNULUS_ASSERT(false, "{} has no bands", describe());
}

void TensorSource::convert_stored(Tensor /*tensor*/, std::int64_t /*batch*/, std::int64_t /*first*/, std::int64_t /*count*/,
                                  void* /*stored*/, DType /*dtype*/, void* /*out*/) const {
  ANNULUS_ASSERT(false, "{} has no bands", describe());
}

}  // namespace annulus
