// SPDX-License-Identifier: Apache-2.0
#include "hdf5_input.hpp"

#include <annulus/core/error.hpp>
#include <annulus/io/source.hpp>
#include <annulus/pattern/progression.hpp>

#include "box_reader.hpp"
#include "chunk_grid.hpp"
#include "complete_dataset.hpp"
#include "element_convert.hpp"
#include "float_dataset.hpp"
#include "hdf5_handle.hpp"
#include "hdf5_open.hpp"
#include "hdf5_sample.hpp"
#include "hdf5_types.hpp"
#include "source_files.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace annulus {

namespace {

/// Nothing if the file has no such dataset.
std::optional<FloatDataset> find_tensor(const std::shared_ptr<const ReadableFile>& file, const std::string& path, Tensor tensor,
                                        SourceFiles& files) {
  const char* name = dataset_name(tensor);
  std::optional<FloatDataset> input = open_float_dataset(file, path, name, files);
  if (!input) { return input; }
  const std::size_t rank = input->extents.size();
  ANNULUS_EXPECTS(rank == 3 || rank == 4,
                  "input file '{}': {} has {} dimensions; allowed are [batch, seq, heads, head_dim] and, for one batch entry, "
                  "[seq, heads, head_dim]",
                  path, name, rank);
  return input;
}

FloatDataset open_tensor(const std::shared_ptr<const ReadableFile>& file, const std::string& path, Tensor tensor, SourceFiles& files) {
  std::optional<FloatDataset> input = find_tensor(file, path, tensor, files);
  ANNULUS_EXPECTS(
      input.has_value(),
      "input file '{}' has no dataset {}; needed are /q [batch, seq, heads, head_dim] and /k, /v [batch, seq, kv_heads, head_dim]", path,
      dataset_name(tensor));
  return std::move(*input);
}

class Hdf5Input final : public TensorSource {
 public:
  Hdf5Input(const std::string& path, InputUse use, std::function<void()> progress = {}) : path_(path), files_(std::move(progress)) {
    const Hdf5Lock lock;
    file_ = files_.open(fmt::format("input file '{}'", path), path);
    for (const Tensor tensor : kSequenceTensors) { dataset(tensor) = open_tensor(file_, path, tensor, files_); }
    for (const Tensor tensor : kExtraTensors) {
      if (auto opened = open_float_dataset(file_, path, dataset_name(tensor), files_)) { dataset(tensor) = std::move(*opened); }
    }
    if (use == InputUse::gradients) { find_dout(); }
    read_problem();
    const std::span<const Tensor> of_problem = tensors_of(problem_);
    tensors_.insert(tensors_.begin(), of_problem.begin(), of_problem.end());
    for (const Tensor tensor : tensors_) {
      files_.step();
      make_readable(dataset(tensor), path, dataset_name(tensor), files_);
    }
    find_bands();
  }

  const Problem& problem() const override { return problem_; }
  std::string describe() const override { return fmt::format("file {}", path_); }
  std::vector<std::string> files() const override { return files_.paths(); }

  std::string identity() const override { return file_instances(files_.paths()); }
  bool has_dout() const override { return tensors_.back() == Tensor::dout; }

  std::uint64_t fingerprint(Tensor tensor, std::int64_t part, std::int64_t parts) const override {
    const FloatDataset& input = dataset(tensor);
    return sample_fingerprint(*input.reader, input.dtype, input.extents, heads_of(problem_, tensor) * problem_.head_dim, part, parts);
  }

  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    ANNULUS_EXPECTS(batch >= 0 && batch < problem_.batch && first >= 0 && count >= 0 && count <= rows_of(problem_, tensor) - first,
                    "rows {}..{} of batch entry {} are outside {} of {}", first, first + count, batch, dataset_name(tensor), describe());
    const FloatDataset& input = dataset(tensor);
    const std::int64_t row_elements = heads_of(problem_, tensor) * problem_.head_dim;
    const std::int64_t most_rows = std::max<std::int64_t>(1, kReadBytes / (row_elements * size_of(input.dtype.dtype)));
    const bool converts = input.dtype.dtype != dtype;
    std::vector<std::byte> scratch(
        converts ? static_cast<std::size_t>(std::min(most_rows, count) * row_elements * size_of(input.dtype.dtype)) : 0);
    for (std::int64_t done = 0, rows = 0; done < count; done += rows) {
      rows = std::min(most_rows, count - done);
      std::byte* target = static_cast<std::byte*>(out) + done * row_elements * size_of(dtype);
      std::byte* stored = converts ? scratch.data() : target;
      const std::optional<RowBands>& bands = bands_[static_cast<std::size_t>(tensor)];
      const RowBands::Band band = bands ? bands->band_at(first + done) : RowBands::Band{first + done, rows};
      const bool direct = !bands || (!converts && problem_.batch == 1 && band.first == first + done && band.count <= count - done);
      if (direct) {
        rows = band.count;
        read_box(tensor, {batch, 1, first + done, rows, 0, heads_of(problem_, tensor), 0, problem_.head_dim}, stored);
      } else {
        copy_from_band(tensor, batch, first + done, rows, stored);
      }
      convert_stored(tensor, batch, first + done, rows, stored, dtype, target);
    }
  }

  std::optional<RowBands> bands(Tensor tensor) const override { return bands_[static_cast<std::size_t>(tensor)]; }

  void read_box(Tensor tensor, const Box& box, void* out) const override {
    const FloatDataset& input = dataset(tensor);
    std::vector<hsize_t> start;
    std::vector<hsize_t> extent;
    for (const auto& [first, count] :
         {std::pair{box.batch, box.batches}, {box.row, box.rows}, {box.head, box.heads}, {box.dim, box.dims}}) {
      start.push_back(static_cast<hsize_t>(first));
      extent.push_back(static_cast<hsize_t>(count));
    }
    if (input.extents.size() == 3) {
      start.erase(start.begin());
      extent.erase(extent.begin());
    }
    const SlabCopy slab = box_in_order(std::move(start), std::move(extent));
    const Hdf5Lock lock;
    input.reader->read(std::span(&slab, 1), out);
  }

  void convert_stored(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, void* stored, DType dtype,
                      void* out) const override {
    const FloatDataset& input = dataset(tensor);
    std::vector<hsize_t> start{static_cast<hsize_t>(batch), static_cast<hsize_t>(first), 0, 0};
    if (input.extents.size() == 3) { start.erase(start.begin()); }
    convert_values(input, path_, dataset_name(tensor), start, stored, count * heads_of(problem_, tensor) * problem_.head_dim, dtype, out);
  }

  void release_buffers() const override {
    for (Band& band : held_) {
      const std::lock_guard<std::mutex> guard(band.mutex);
      band.bytes = {};
      band.number = -1;
    }
    const Hdf5Lock lock;
    for (const Tensor tensor : tensors_) { dataset(tensor).reader->release_buffers(); }
  }

  /// Reads `bytes` of values, spread over the datasets.
  void read_samples(std::int64_t bytes) {
    std::int64_t datasets_left = std::ssize(tensors_);
    for (const Tensor tensor : tensors_) { bytes -= sample(tensor, bytes, bytes / datasets_left--); }
  }

 private:
  /// Rows of one band, [batches, rows, heads, head_dim] as stored; read() takes its rows from it.
  struct Band {
    std::mutex mutex;
    std::int64_t number = -1;  ///< none yet
    std::vector<std::byte> bytes;
  };

  /// Finds the datasets whose chunks must be decoded whole.
  void find_bands() {
    for (const Tensor tensor : tensors_) {
      const FloatDataset& input = dataset(tensor);
      const std::int64_t all_rows = rows_of(problem_, tensor);
      const std::optional<DecodedUnit> unit = input.reader->decoded_unit();
      if (!unit) { continue; }
      std::vector<hsize_t> chunk = unit->extents;
      const std::int64_t element = size_of(input.dtype.dtype);
      // A chunk may be larger than a dataset that can grow.
      for (std::size_t axis = 0; axis < chunk.size(); ++axis) { chunk[axis] = std::min(chunk[axis], input.extents[axis]); }
      if (chunk.size() == 3) { chunk.insert(chunk.begin(), 1); }
      RowBands& bands = bands_[static_cast<std::size_t>(tensor)].emplace();
      bands.batches = static_cast<std::int64_t>(chunk[0]);
      bands.seq_len = all_rows;
      bands.chunk_heads = static_cast<std::int64_t>(chunk[2]);
      bands.chunk_dims = static_cast<std::int64_t>(chunk[3]);
      bands.row_bytes = heads_of(problem_, tensor) * problem_.head_dim * element;
      bands.chunk_bytes = unit->bytes;
      const bool one = problem_.batch * all_rows * bands.row_bytes <= kReadBytes;
      // One band: whoever comes back to an earlier batch entry, as virtual ranks do, finds it decoded.
      if (one) { bands.batches = problem_.batch; }
      bands.stretches = one ? std::vector<RowBands::Stretch>{{0, static_cast<std::int64_t>(chunk[1]), 0}}
                            : chunk_stretches(unit->grids[unit->grids.size() - 3], all_rows, static_cast<std::int64_t>(chunk[1]));
      for (RowBands::Stretch& stretch : bands.stretches) {
        bands.chunk_rows = std::max(bands.chunk_rows, stretch.chunk_rows);
        const std::int64_t chunks = kReadBytes / (bands.batches * stretch.chunk_rows * bands.row_bytes);
        stretch.rows = one ? all_rows : stretch.chunk_rows * std::max<std::int64_t>(1, chunks);
      }
    }
  }

  /// Rows within one batch entry from the bands they lie in, each of which is read by one call, so that its chunks are decoded once.
  void copy_from_band(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, std::byte* out) const {
    const RowBands& bands = *bands_[static_cast<std::size_t>(tensor)];
    Band& band = held_[static_cast<std::size_t>(tensor)];
    const std::lock_guard<std::mutex> guard(band.mutex);
    for (std::int64_t done = 0; done < count;) {
      const auto [begin, rows, chunk_rows] = bands.band_at(first + done);
      const std::int64_t batch_begin = batch / bands.batches * bands.batches;
      const std::int64_t number = batch_begin * bands.seq_len + begin;
      if (band.number != number) {
        const std::int64_t batches = std::min(bands.batches, problem_.batch - batch_begin);
        band.number = -1;
        band.bytes.resize(static_cast<std::size_t>(batches * rows * bands.row_bytes));
        read_box(tensor, {batch_begin, batches, begin, rows, 0, heads_of(problem_, tensor), 0, problem_.head_dim}, band.bytes.data());
        band.number = number;
      }
      const std::int64_t taken = std::min(count - done, begin + rows - first - done);
      const std::int64_t place = (batch - batch_begin) * rows + first + done - begin;
      std::memcpy(out + done * bands.row_bytes, band.bytes.data() + place * bands.row_bytes,
                  static_cast<std::size_t>(taken * bands.row_bytes));
      done += taken;
    }
  }

  /// Reads up to `share` bytes of a dataset in units of a chunk or of some rows, at least one of `most` bytes or fewer. Returns the bytes.
  std::int64_t sample(Tensor tensor, std::int64_t most, std::int64_t share) {
    constexpr std::int64_t kUnitBytes = std::int64_t{1} << 18;
    constexpr std::int64_t kMostUnits = 65536;
    const std::int64_t element = size_of(dataset(tensor).dtype.dtype);
    const std::int64_t heads = heads_of(problem_, tensor);
    const std::int64_t all_rows = rows_of(problem_, tensor);
    const std::int64_t row_bytes = heads * problem_.head_dim * element;
    Box unit{0, 1, 0, std::clamp<std::int64_t>(kUnitBytes / row_bytes, 1, all_rows), 0, heads, 0, problem_.head_dim};
    if (const auto& bands = bands_[static_cast<std::size_t>(tensor)]) {
      unit = {0, bands->batches, 0, bands->chunk_rows, 0, bands->chunk_heads, 0, bands->chunk_dims};
    }
    const std::array<std::int64_t, 4> units{ceil_div(problem_.batch, unit.batches), ceil_div(all_rows, unit.rows),
                                            ceil_div(heads, unit.heads), ceil_div(problem_.head_dim, unit.dims)};
    const std::int64_t count = units[0] * units[1] * units[2] * units[3];
    const std::int64_t unit_bytes = unit.batches * unit.rows * unit.heads * unit.dims * element;
    const std::int64_t wanted = std::min({count, kMostUnits, std::max(share / unit_bytes, std::int64_t{unit_bytes <= most})});
    std::vector<std::byte> scratch(static_cast<std::size_t>(wanted > 0 ? unit_bytes : 0));
    for (std::int64_t index = 0; index < wanted; ++index) {
      // From the first to the last.
      std::int64_t rest =
          wanted == 1
              ? 0
              : static_cast<std::int64_t>(static_cast<double>(index) / static_cast<double>(wanted - 1) * static_cast<double>(count - 1));
      if (wanted == count) { rest = index; }
      Box box;
      const auto take = [&rest](std::int64_t parts) {
        const std::int64_t part = rest % parts;
        rest /= parts;
        return part;
      };
      box.dim = take(units[3]) * unit.dims;
      box.head = take(units[2]) * unit.heads;
      box.row = take(units[1]) * unit.rows;
      box.batch = take(units[0]) * unit.batches;
      box.dims = std::min(unit.dims, problem_.head_dim - box.dim);
      box.heads = std::min(unit.heads, heads - box.head);
      box.rows = std::min(unit.rows, all_rows - box.row);
      box.batches = std::min(unit.batches, problem_.batch - box.batch);
      read_box(tensor, box, scratch.data());
      files_.step();
    }
    return wanted * unit_bytes;
  }

  FloatDataset& dataset(Tensor tensor) { return datasets_[static_cast<std::size_t>(tensor)]; }
  const FloatDataset& dataset(Tensor tensor) const { return datasets_[static_cast<std::size_t>(tensor)]; }

  void find_dout() {
    std::optional<FloatDataset> found = find_tensor(file_, path_, Tensor::dout, files_);
    if (!found) { return; }
    const FloatDataset& q = dataset(Tensor::q);
    ANNULUS_EXPECTS(found->dtype.dtype == q.dtype.dtype && found->extents == q.extents,
                    "input file '{}': /do is {} {} and /q {} {}; they must be alike", path_, to_string(found->dtype.dtype),
                    shape_text(found->extents), to_string(q.dtype.dtype), shape_text(q.extents));
    dataset(Tensor::dout) = std::move(*found);
    tensors_.push_back(Tensor::dout);
  }

  void read_problem() {
    const FloatDataset& q = dataset(Tensor::q);
    const FloatDataset& k = dataset(Tensor::k);
    const FloatDataset& v = dataset(Tensor::v);
    for (const Tensor tensor : {Tensor::k, Tensor::v}) {
      const FloatDataset& other = dataset(tensor);
      ANNULUS_EXPECTS(other.dtype.dtype == q.dtype.dtype, "input file '{}': /q is {} but {} is {}; all must have one dtype", path_,
                      to_string(q.dtype.dtype), dataset_name(tensor), to_string(other.dtype.dtype));
    }
    ANNULUS_EXPECTS(k.extents == v.extents, "input file '{}': /k is {} but /v is {}; they must have one shape", path_,
                    shape_text(k.extents), shape_text(v.extents));
    const std::size_t rank = q.extents.size();
    bool agree = k.extents.size() == rank && k.extents[rank - 1] == q.extents[rank - 1];
    for (std::size_t axis = 0; agree && axis + 2 < rank; ++axis) { agree = k.extents[axis] == q.extents[axis]; }
    ANNULUS_EXPECTS(agree, "input file '{}': /q is {} but /k and /v are {}; they may differ in their heads only", path_,
                    shape_text(q.extents), shape_text(k.extents));

    problem_.batch = rank == 4 ? static_cast<std::int64_t>(q.extents[0]) : 1;
    problem_.seq_len = static_cast<std::int64_t>(q.extents[rank - 3]);
    problem_.heads = static_cast<std::int64_t>(q.extents[rank - 2]);
    problem_.kv_heads = static_cast<std::int64_t>(k.extents[rank - 2]);
    problem_.head_dim = static_cast<std::int64_t>(q.extents[rank - 1]);
    problem_.dtype = q.dtype.dtype;
    problem_.causal = false;
    ANNULUS_EXPECTS(problem_.head_dim <= kMaxHeadDim, "input file '{}': /q is {}; head_dim (the last extent) may be at most {}", path_,
                    shape_text(q.extents), kMaxHeadDim);
    ANNULUS_EXPECTS(problem_.heads % problem_.kv_heads == 0, "input file '{}': the {} heads of /k and /v do not divide the {} heads of /q",
                    path_, problem_.kv_heads, problem_.heads);
    read_extra_keys();
    problem_.scale = read_scale(file_->get(), path_, problem_.head_dim);
    require_valid(problem_, path_);
    problem_.kv_lengths = read_kv_lengths(file_, path_, problem_.batch, files_);
    require_valid(problem_, path_);
  }

  /// How many extra keys there are, if any.
  void read_extra_keys() {
    const FloatDataset& keys = dataset(Tensor::k_extra);
    const FloatDataset& values = dataset(Tensor::v_extra);
    ANNULUS_EXPECTS(keys.extents.empty() == values.extents.empty(), "input file '{}' has {} without {}", path_,
                    keys.extents.empty() ? "/v_extra" : "/k_extra", keys.extents.empty() ? "/k_extra" : "/v_extra");
    if (keys.extents.empty()) { return; }
    const FloatDataset& k = dataset(Tensor::k);
    const std::size_t row_axis = k.extents.size() - 3;
    for (const Tensor tensor : kExtraTensors) {
      const FloatDataset& extra = dataset(tensor);
      ANNULUS_EXPECTS(extra.dtype.dtype == k.dtype.dtype, "input file '{}': /k is {} but {} is {}; all must have one dtype", path_,
                      to_string(k.dtype.dtype), dataset_name(tensor), to_string(extra.dtype.dtype));
      bool agree = extra.extents.size() == k.extents.size();
      for (std::size_t axis = 0; agree && axis < k.extents.size(); ++axis) {
        agree = axis == row_axis || extra.extents[axis] == k.extents[axis];
      }
      ANNULUS_EXPECTS(agree, "input file '{}': /k is {} but {} is {}; they may differ in their rows only", path_, shape_text(k.extents),
                      dataset_name(tensor), shape_text(extra.extents));
    }
    ANNULUS_EXPECTS(keys.extents == values.extents, "input file '{}': /k_extra is {} but /v_extra is {}; they must have one shape", path_,
                    shape_text(keys.extents), shape_text(values.extents));
    problem_.extra_keys = static_cast<std::int64_t>(keys.extents[row_axis]);
  }

  std::string path_;
  SourceFiles files_;
  std::shared_ptr<const ReadableFile> file_;     ///< stays locked
  std::vector<Tensor> tensors_;                  ///< those that it has
  std::array<FloatDataset, kTensors> datasets_;  ///< by Tensor; closed before the files; those that it lacks have no extents
  Problem problem_;
  std::array<std::optional<RowBands>, kTensors> bands_;  ///< by Tensor
  mutable std::array<Band, kTensors> held_;              ///< by Tensor
};

}  // namespace

void read_samples(const std::string& path, InputUse use, std::int64_t bytes, const std::function<void()>& progress) {
  Hdf5Input(path, use, progress).read_samples(bytes);
}

std::unique_ptr<TensorSource> open_input(const std::string& path, InputUse use) { return std::make_unique<Hdf5Input>(path, use); }

}  // namespace annulus
