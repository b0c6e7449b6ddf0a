// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/problem.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace annulus {

enum class Tensor { q, k, v };

/// Where Q, K and V come from: a file or the generator. Any rank may read any rows; const calls are independent of each other.
class TensorSource {
 public:
  virtual ~TensorSource() = default;

  /// Extents and dtype of what it holds. causal is off; scale is the file's attribute or 1/sqrt(head_dim).
  virtual const Problem& problem() const = 0;

  /// Rows [first, first+count) of one batch entry of `tensor` into `out` [count, heads of that tensor, head_dim], converted to `dtype` once
  /// (16-bit: to nearest even).
  /// @throws InvalidArgument naming dataset and first index if a value is NaN or infinite, RuntimeFailure if reading fails
  virtual void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const = 0;

  /// For messages: "file x.h5" or "generator, seed 1".
  virtual std::string describe() const = 0;

  /// What the values are read from, as text that two processes have alike only if they read the very same thing: a file by its machine,
  /// device and number there, a generator by its seed.
  virtual std::string identity() const = 0;

  /// A number that tells whether sources of equal problems hold equal values: the sum, modulo 2^64, of a hash of every sampled value and
  /// its place. Of a file all values of a small tensor as stored, else those of the first and the last row and of at least 4,096 places
  /// that depend on the shape alone. The sample is shared by `parts` callers; their sums add up to the same number however many they are.
  /// @throws RuntimeFailure if reading fails
  virtual std::uint64_t fingerprint(Tensor tensor, std::int64_t part, std::int64_t parts) const = 0;
};

/// Standard normal values that depend on (seed, tensor, global element index) alone, so that any number of ranks sees the same problem.
/// The problem's dtype is the dtype the values are generated for. `threads` threads fill a long read(); their number changes no bit.
/// @throws InvalidArgument if the problem is invalid or threads < 1
std::unique_ptr<TensorSource> make_generator(const Problem& problem, std::uint64_t seed, int threads = 1);

/// An HDF5 file with /q [batch, seq, heads, head_dim], /k and /v [batch, seq, kv_heads, head_dim] (or 3-D, batch 1); fp32, fp16 or bf16.
/// @throws InvalidArgument naming file and dataset if it is absent, truncated, foreign, or shaped or typed otherwise
std::unique_ptr<TensorSource> open_input(const std::string& path);

}  // namespace annulus
