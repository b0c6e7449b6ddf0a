// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/source.hpp>

#include <annulus/core/error.hpp>

#include "hdf5_types.hpp"

#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>

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
  std::vector<Tensor> tensors(tensors_of(problem()).begin(), tensors_of(problem()).end());
  if (has_dout()) { tensors.push_back(Tensor::dout); }
  for (const Tensor tensor : tensors) {
    all.push_back({fmt::format("values of {}", dataset_name(tensor)), fingerprint(tensor, part, parts)});
  }
  return all;
}

namespace {

/// Q, K and V of one source, and the dO of a generator.
class WithGeneratedDout final : public SourceView {
 public:
  WithGeneratedDout(std::unique_ptr<TensorSource> source, std::uint64_t seed, int threads)
      : SourceView(*source), source_(std::move(source)), generator_(make_generator(source_->problem(), seed, threads)) {}

  std::string describe() const override { return fmt::format("{}, /do of the {}", source_->describe(), generator_->describe()); }
  std::string identity() const override { return source_->identity() + generator_->identity(); }
  std::vector<std::string> files() const override { return source_->files(); }
  bool has_dout() const override { return true; }
  std::uint64_t fingerprint(Tensor tensor, std::int64_t part, std::int64_t parts) const override {
    return of(tensor).fingerprint(tensor, part, parts);
  }
  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    of(tensor).read(tensor, batch, first, count, dtype, out);
  }
  std::optional<RowBands> bands(Tensor tensor) const override { return of(tensor).bands(tensor); }
  void read_box(Tensor tensor, const Box& box, void* out) const override { of(tensor).read_box(tensor, box, out); }
  void convert_stored(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, void* stored, DType dtype,
                      void* out) const override {
    of(tensor).convert_stored(tensor, batch, first, count, stored, dtype, out);
  }
  void release_buffers() const override { source_->release_buffers(); }

 private:
  const TensorSource& of(Tensor tensor) const { return tensor == Tensor::dout ? *generator_ : *source_; }

  std::unique_ptr<TensorSource> source_;
  std::unique_ptr<TensorSource> generator_;
};

}  // namespace

std::unique_ptr<TensorSource> with_generated_dout(std::unique_ptr<TensorSource> source, std::uint64_t seed, int threads) {
  if (source->has_dout()) { return source; }
  return std::make_unique<WithGeneratedDout>(std::move(source), seed, threads);
}

void TensorSource::read_box(Tensor /*tensor*/, const Box& /*box*/, void* /*out*/) const {
  ANNULUS_ASSERT(false, "{} has no bands", describe());
}

void TensorSource::convert_stored(Tensor /*tensor*/, std::int64_t /*batch*/, std::int64_t /*first*/, std::int64_t /*count*/,
                                  void* /*stored*/, DType /*dtype*/, void* /*out*/) const {
  ANNULUS_ASSERT(false, "{} has no bands", describe());
}

}  // namespace annulus
