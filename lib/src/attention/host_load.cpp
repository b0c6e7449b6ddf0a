// SPDX-License-Identifier: Apache-2.0
#include "host_load.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <span>
#include <vector>

namespace annulus {

namespace {

constexpr int kRowsTag = 21;

/// Consecutive rows of the whole sequence.
struct Range {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

Range common(const Range& a, const Range& b) {
  const std::int64_t first = std::max(a.first, b.first);
  return {first, std::max<std::int64_t>(0, std::min(a.first + a.count, b.first + b.count) - first)};
}

/// Rows of one band that were put together from parts of chunks, as a source.
class BandRows final : public SourceView {
 public:
  BandRows(const TensorSource& file, std::int64_t row_bytes) : SourceView(file), row_bytes_(row_bytes) {}

  /// Makes room for `batches` batch entries of these rows.
  void begin(std::int64_t batch, std::int64_t batches, const std::vector<Range>& rows) {
    batch_ = batch;
    rows_ = rows;
    count_ = 0;
    for (const Range& range : rows) { count_ += range.count; }
    bytes_.resize(static_cast<std::size_t>(batches * count_ * row_bytes_));
  }

  std::byte* row(std::int64_t batch, std::int64_t row) const {
    std::int64_t before = 0;
    for (const Range& range : rows_) {
      if (row >= range.first && row < range.first + range.count) {
        return bytes_.data() + ((batch - batch_) * count_ + before + row - range.first) * row_bytes_;
      }
      before += range.count;
    }
    ANNULUS_ASSERT(false, "row {} is not in this band", row);
    return nullptr;
  }

  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    viewed().convert_stored(tensor, batch, first, count, row(batch, first), dtype, out);
  }

 private:
  std::int64_t row_bytes_;
  std::int64_t batch_ = 0;
  std::int64_t count_ = 0;
  std::vector<Range> rows_;
  mutable std::vector<std::byte> bytes_;  ///< [batches, rows, row_bytes]; conversion swaps bytes in place
};

class HostLoad {
 public:
  HostLoad(const TensorSource& source, Tensor tensor, const Communicator& comm, std::span<const HostBox> boxes, const TakeRows& take)
      : source_(source), tensor_(tensor), comm_(comm), take_(take), bands_(*source.bands(tensor)), rows_(source, bands_.row_bytes) {
    const Problem& problem = source.problem();
    heads_ = heads_of(problem, tensor);
    element_bytes_ = bands_.row_bytes / (heads_ * problem.head_dim);
    ANNULUS_EXPECTS(std::ssize(boxes) == comm.host_size(), "{} boxes for {} ranks", boxes.size(), comm.host_size());
    for (const HostBox& box : boxes) {
      Wanted& wanted = wanted_.emplace_back();
      wanted.entries = {box.batch, box.batches};
      for (const ShardPiece& piece : box.shard.pieces) {
        ANNULUS_ASSERT(piece.global.stride == 1, "reading rows {} apart", piece.global.stride);
        wanted.rows.push_back({piece.global.first, piece.global.count});
      }
    }
  }

  void run() {
    const Problem& problem = source_.problem();
    for (std::int64_t batch = 0; batch < problem.batch; batch += bands_.batches) {
      for (std::int64_t row = 0; row < problem.seq_len;) {
        const RowBands::Band band = bands_.band_at(row);
        load_band(batch, std::min(bands_.batches, problem.batch - batch), {band.first, band.count}, band.chunk_rows);
        row = band.first + band.count;
      }
    }
    if (failure_) { std::rethrow_exception(failure_); }
  }

 private:
  /// What a rank takes.
  struct Wanted {
    Range entries;
    std::vector<Range> rows;
  };

  /// After a failure nothing more is read or taken, but the others still get their messages.
  template <class Body>
  void guarded(Body&& body) {
    if (failure_) { return; }
    try {
      body();
    } catch (...) { failure_ = std::current_exception(); }
  }

  bool anyone_needs(const Range& entries, const Range& rows) const {
    return std::any_of(wanted_.begin(), wanted_.end(), [&](const Wanted& wanted) {
      return common(wanted.entries, entries).count > 0 &&
             std::any_of(wanted.rows.begin(), wanted.rows.end(), [&](const Range& own) { return common(own, rows).count > 0; });
    });
  }

  /// The chunks of a band that hold rows of this host, the same list on all its ranks.
  std::vector<Box> chunks_of(std::int64_t batch, std::int64_t batches, const Range& band, std::int64_t chunk_rows) const {
    std::vector<Box> chunks;
    const std::int64_t head_dim = source_.problem().head_dim;
    for (std::int64_t row = band.first; row < band.first + band.count; row += chunk_rows) {
      const Range rows{row, std::min(chunk_rows, band.first + band.count - row)};
      if (!anyone_needs({batch, batches}, rows)) { continue; }
      for (std::int64_t head = 0; head < heads_; head += bands_.chunk_heads) {
        for (std::int64_t dim = 0; dim < head_dim; dim += bands_.chunk_dims) {
          chunks.push_back({batch, batches, row, rows.count, head, std::min(bands_.chunk_heads, heads_ - head), dim,
                            std::min(bands_.chunk_dims, head_dim - dim)});
        }
      }
    }
    return chunks;
  }

  void load_band(std::int64_t batch, std::int64_t batches, const Range& band, std::int64_t chunk_rows) {
    const std::vector<Box> chunks = chunks_of(batch, batches, band, chunk_rows);
    if (chunks.empty()) { return; }
    const Range entries = common(wanted_[me()].entries, {batch, batches});
    std::vector<Range> own;
    for (const Range& range : wanted_[me()].rows) {
      if (const Range part = common(range, band); part.count > 0 && entries.count > 0) { own.push_back(part); }
    }
    rows_.begin(entries.first, entries.count, own);
    for (std::size_t round = 0; round < chunks.size(); round += wanted_.size()) {
      const std::size_t end = std::min(chunks.size(), round + wanted_.size());
      if (round + me() < end) { read_chunk(chunks[round + me()]); }
      for (std::size_t index = round; index < end; ++index) { deliver(chunks[index], index - round); }
    }
    for (const Range& range : own) {
      for (std::int64_t entry = entries.first; entry < entries.first + entries.count; ++entry) {
        guarded([&] { take_(rows_, tensor_, entry, range.first, range.count); });
      }
    }
  }

  std::int64_t row_bytes(const Box& chunk) const { return chunk.heads * chunk.dims * element_bytes_; }

  void read_chunk(const Box& chunk) {
    chunk_.resize(static_cast<std::size_t>(chunk.batches * chunk.rows * row_bytes(chunk)));
    guarded([&] { source_.read_box(tensor_, chunk, chunk_.data()); });
  }

  /// Brings the rows of a chunk from the rank of the host that read it to those that own them. All ranks walk the same list in the same
  /// order, so that no two wait for each other.
  void deliver(const Box& chunk, std::size_t reader) {
    for (std::size_t owner = 0; owner < wanted_.size(); ++owner) {
      if (me() != reader && me() != owner) { continue; }
      const Range entries = common(wanted_[owner].entries, {chunk.batch, chunk.batches});
      for (const Range& range : wanted_[owner].rows) {
        const Range part = common(range, {chunk.row, chunk.rows});
        if (part.count == 0) { continue; }
        for (std::int64_t entry = entries.first - chunk.batch; entry < entries.first - chunk.batch + entries.count; ++entry) {
          const auto bytes = static_cast<std::size_t>(part.count * row_bytes(chunk));
          const std::int64_t place = (entry * chunk.rows + part.first - chunk.row) * row_bytes(chunk);
          if (me() != owner) {
            comm_.send(std::span(chunk_).subspan(static_cast<std::size_t>(place), bytes), comm_.host_ranks()[owner], kRowsTag);
          } else if (me() == reader) {
            scatter(chunk, chunk.batch + entry, part, chunk_.data() + place);
          } else {
            received_.resize(bytes);
            comm_.receive(received_, comm_.host_ranks()[reader], kRowsTag);
            scatter(chunk, chunk.batch + entry, part, received_.data());
          }
        }
      }
    }
  }

  void scatter(const Box& chunk, std::int64_t batch, const Range& part, const std::byte* from) {
    const std::int64_t head_bytes = source_.problem().head_dim * element_bytes_;
    const std::int64_t part_bytes = chunk.dims * element_bytes_;
    for (std::int64_t row = part.first; row < part.first + part.count; ++row) {
      std::byte* to = rows_.row(batch, row) + chunk.head * head_bytes + chunk.dim * element_bytes_;
      for (std::int64_t head = 0; head < chunk.heads; ++head, from += part_bytes) {
        std::memcpy(to + head * head_bytes, from, static_cast<std::size_t>(part_bytes));
      }
    }
  }

  std::size_t me() const { return static_cast<std::size_t>(comm_.host_rank()); }

  const TensorSource& source_;
  Tensor tensor_;
  const Communicator& comm_;
  const TakeRows& take_;
  RowBands bands_;
  BandRows rows_;
  std::int64_t heads_ = 0;
  std::int64_t element_bytes_ = 0;
  std::vector<Wanted> wanted_;  ///< by rank of the host
  std::vector<std::byte> chunk_;
  std::vector<std::byte> received_;
  std::exception_ptr failure_;
};

}  // namespace

std::int64_t host_load_bytes(const TensorSource& source, Tensor tensor) {
  const auto bands = source.bands(tensor);
  if (!bands) { return 0; }
  // The rows of a band and a chunk, read and received.
  return bands->bytes() + 2 * bands->batches * bands->chunk_rows * bands->row_bytes;
}

void load_on_host(const TensorSource& source, Tensor tensor, const Communicator& comm, std::span<const HostBox> boxes,
                  const TakeRows& take) {
  HostLoad(source, tensor, comm, boxes, take).run();
}

}  // namespace annulus
