// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/problem.hpp>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace annulus {

enum class Tensor {
  q,
  k,
  v,
  k_extra,
  v_extra,
  dout,  ///< what the loss changes by with each element of O; has the shape of Q
};

/// Those with a row for each token of the sequence that every source has.
inline constexpr std::array<Tensor, 3> kSequenceTensors{Tensor::q, Tensor::k, Tensor::v};
/// The extra keys and their values.
inline constexpr std::array<Tensor, 2> kExtraTensors{Tensor::k_extra, Tensor::v_extra};
inline constexpr std::size_t kTensors = kSequenceTensors.size() + kExtraTensors.size() + 1;

/// Those that a problem has; a loss that is differentiated has Tensor::dout besides.
std::span<const Tensor> tensors_of(const Problem& problem);

/// Rows of a batch entry of the tensor.
inline std::int64_t rows_of(const Problem& problem, Tensor tensor) {
  return tensor == Tensor::k_extra || tensor == Tensor::v_extra ? problem.extra_keys : problem.seq_len;
}

/// Heads of a row of the tensor.
inline std::int64_t heads_of(const Problem& problem, Tensor tensor) {
  return tensor == Tensor::q || tensor == Tensor::dout ? problem.heads : problem.kv_heads;
}

/// Bytes of a row of the tensor, all its heads, in the problem's dtype; a row of O is as long as one of Q.
inline std::int64_t row_bytes(const Problem& problem, Tensor tensor) {
  return heads_of(problem, tensor) * problem.head_dim * size_of(problem.dtype);
}

/// A part of a tensor: so many batch entries, rows, heads and elements of a head from the first ones on.
struct Box {
  std::int64_t batch = 0;
  std::int64_t batches = 0;
  std::int64_t row = 0;
  std::int64_t rows = 0;
  std::int64_t head = 0;
  std::int64_t heads = 0;
  std::int64_t dim = 0;
  std::int64_t dims = 0;
};

/// How a tensor is stored whose rows cannot be read alone, since they lie in chunks that are decoded whole. A band is whole chunks over all
/// heads: `batches` batch entries by some rows.
struct RowBands {
  /// Rows from `first` to the next stretch: no chunk of any head reaches over a multiple of chunk_rows, counted from `first`, and bands
  /// have `rows`, a multiple of that. A tensor has more than one where it is put together from parts of unequal lengths.
  struct Stretch {
    std::int64_t first = 0;
    std::int64_t chunk_rows = 1;
    std::int64_t rows = 1;
  };

  /// Rows [first, first + count), to be read in units of chunk_rows.
  struct Band {
    std::int64_t first = 0;
    std::int64_t count = 0;
    std::int64_t chunk_rows = 1;
  };

  std::int64_t batches = 1;
  std::int64_t seq_len = 0;
  std::vector<Stretch> stretches;  ///< ascending, the first at 0
  std::int64_t chunk_rows = 1;     ///< the most of any stretch
  std::int64_t chunk_heads = 1;
  std::int64_t chunk_dims = 1;
  std::int64_t row_bytes = 0;    ///< of all heads of a row, as stored
  std::int64_t chunk_bytes = 0;  ///< of a whole chunk when it is decoded, the largest where parts of the tensor differ

  /// The band that holds this row.
  Band band_at(std::int64_t row) const;

  /// What read() keeps of the tensor, as long as release_buffers() is not called.
  std::int64_t bytes() const;

  /// What decoding needs besides: a chunk twice as it was stored, which filters shorten or leave about as long, its place among chunks of
  /// other lengths that came before, and what the filters make of it.
  std::int64_t decoding_bytes() const { return 4 * chunk_bytes; }
};

/// A part of what tells whether two inputs hold equal values.
struct Fingerprint {
  std::string name;  ///< "values of /q"
  std::uint64_t sum = 0;
};

/// An input as messages and comparisons see it, whatever it holds.
class InputSource {
 public:
  virtual ~InputSource() = default;

  /// For messages: "file x.h5" or "generator, seed 1".
  virtual std::string describe() const = 0;

  /// What the values are read from, as text that two processes have alike only if they read the very same thing: a file by its machine,
  /// device and number there, with all files its values come from, a generator by its seed.
  virtual std::string identity() const = 0;

  /// Paths of all files that its values come from; none for the generator.
  virtual std::vector<std::string> files() const { return {}; }

  /// Numbers that tell whether inputs of equal extents hold equal values, one for each dataset: the sum, modulo 2^64, of a hash of every
  /// sampled value and its place. Of a file all values of a small dataset as stored, else those of the first and the last row and of at
  /// least 4,096 places that depend on the shape alone. The sample is shared by `parts` callers; their sums add up to the same numbers
  /// however many they are.
  /// @throws as reading does
  virtual std::vector<Fingerprint> fingerprints(std::int64_t part, std::int64_t parts) const = 0;
};

/// Where Q, K, V, extra keys and the gradient of O come from: a file or the generator. Any rank may read any rows; const calls are
/// independent of each other.
class TensorSource : public InputSource {
 public:
  /// Extents and dtype of what it holds. causal is off; scale is the file's attribute or 1/sqrt(head_dim); kv_lengths and the number of
  /// extra keys are the file's.
  virtual const Problem& problem() const = 0;

  /// Rows [first, first+count) of one batch entry of `tensor` into `out` [count, heads of that tensor, head_dim], converted to `dtype` once
  /// (16-bit: to nearest even).
  /// @throws InvalidArgument naming dataset and first index if a value is NaN or infinite or damaged, RuntimeFailure if the disk fails
  virtual void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const = 0;
  /// Whether it holds Tensor::dout; the other three it always does.
  virtual bool has_dout() const { return false; }

  /// Of one tensor. @throws as read()
  virtual std::uint64_t fingerprint(Tensor tensor, std::int64_t part, std::int64_t parts) const = 0;
  std::vector<Fingerprint> fingerprints(std::int64_t part, std::int64_t parts) const override;

  /// Whether and how the tensor must be read in bands. read() then keeps the latest band of every tensor, so that rows read in order decode
  /// each chunk once.
  virtual std::optional<RowBands> bands(Tensor /*tensor*/) const { return std::nullopt; }
  /// Part of a tensor that has bands(), [batches, rows, heads, dims] as stored. Aligned to chunks it decodes each of them once.
  virtual void read_box(Tensor tensor, const Box& box, void* out) const;
  /// Checks and converts rows as read_box() gave them, with all heads, as read() does; `stored` is scratch afterwards. `out` may be
  /// `stored` where the dtype is the same.
  virtual void convert_stored(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, void* stored, DType dtype,
                              void* out) const;
  /// Frees what read() keeps.
  virtual void release_buffers() const {}
};

/// A source that hands on what another one, which must outlive it, has: it says of itself what that one says.
class SourceView : public TensorSource {
 public:
  const Problem& problem() const override { return viewed_.problem(); }
  std::string describe() const override { return viewed_.describe(); }
  std::string identity() const override { return viewed_.identity(); }
  bool has_dout() const override { return viewed_.has_dout(); }
  std::uint64_t fingerprint(Tensor tensor, std::int64_t part, std::int64_t parts) const override {
    return viewed_.fingerprint(tensor, part, parts);
  }

 protected:
  explicit SourceView(const TensorSource& viewed) : viewed_(viewed) {}
  const TensorSource& viewed() const { return viewed_; }

 private:
  const TensorSource& viewed_;
};

/// Standard normal values that depend on (seed, tensor, global element index) alone, so that any number of ranks sees the same problem.
/// The problem's dtype is the dtype the values are generated for. `threads` threads fill a long read(); their number changes no bit.
/// @throws InvalidArgument if the problem is invalid or threads < 1
std::unique_ptr<TensorSource> make_generator(const Problem& problem, std::uint64_t seed, int threads = 1);

/// Which tensors of an input are read.
enum class InputUse {
  forward,    ///< Q, K and V
  gradients,  ///< and dO, if the input has it
};

/// An HDF5 file with /q [batch, seq, heads, head_dim], /k and /v [batch, seq, kv_heads, head_dim] (or 3-D, batch 1); fp32, fp16 or bf16.
/// It may hold /kv_lengths [batch], int64 in 1..seq, and extra keys: /k_extra and /v_extra [batch, n, kv_heads, head_dim] (3-D as
/// they are), and for gradients /do in the shape and dtype of /q.
/// What it needs is asked for before anything is read: sources of virtual datasets, external storage, chunks, filters.
/// @throws InvalidArgument naming file and dataset if it is absent, truncated, damaged, locked, foreign, incomplete, or shaped or typed
/// otherwise
std::unique_ptr<TensorSource> open_input(const std::string& path, InputUse use = InputUse::forward);

/// A source with a dO that is generated, as make_generator() does, where it has none of its own.
std::unique_ptr<TensorSource> with_generated_dout(std::unique_ptr<TensorSource> source, std::uint64_t seed, int threads);

}  // namespace annulus
