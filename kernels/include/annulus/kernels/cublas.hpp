// SPDX-License-Identifier: Apache-2.0
// The kernel cublas: how it cuts attention into tiles (pure arithmetic, no device), and the attention itself, of which all that cuda.hpp
// says of the kernels of backend cuda holds.
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <cstdint>
#include <exception>
#include <memory>
#include <span>

struct CUstream_st;

namespace annulus::kernels::cuda {

/// How CublasAttention cuts attention into tiles of scores. A tile is `rows` query rows (q_tile rows of several heads or segments) by
/// `k_tile` keys; the scores of one tile per stream are in flight at a time and should stay in the L2 cache, 4 bytes for each.
struct CublasTiling {
  std::int64_t streams = 2;          ///< tiles in flight; 1..8
  std::int64_t rows = 2048;          ///< query rows of a tile over all its heads and segments; at most 65535
  std::int64_t q_tile = 2048;        ///< query rows of one head in a tile, without a mask
  std::int64_t causal_q_tile = 512;  ///< the same under a causal mask: smaller, because a diagonal tile is computed whole
  std::int64_t k_tile = 2048;        ///< keys of a tile; at most 4096, a row must fit the registers of a warp
  bool operator==(const CublasTiling&) const = default;
};

/// The tiles that serve tasks of this head_dim, dtype and mask best.
CublasTiling default_tiling(std::int64_t head_dim, DType dtype, Mask mask);
/// The same for the backward pass, which keeps 4 bytes for each score of a tile too.
CublasTiling default_gradient_tiling(DType dtype);

/// FLOPs a second of a plain product of cuBLAS, [8192, 4096] x [4096, 8192] of random numbers with sums in fp32, on the current device: the
/// median of 16 after 4. What attention is measured against. Takes 256 MiB for 16-bit elements and 30 ms; 0 if that memory is not there.
/// @throws LibraryError if a call fails
double product_rate(DType dtype);

/// How CublasAttention gives its work to the device; the results are the same bits.
enum class Submission {
  eager,  ///< launch by launch, every time
  graph,  ///< a list of tasks that comes back is recorded as a CUDA graph, and launched whole from then on
};

/// Attention as two library products around a softmax of our own: S = scale Q K^T (fp32), P = exp(S - max) written over S in the
/// operands' dtype, acc += P V (fp32). Dilated rows are a leading dimension and are never gathered. The row sums are those of the
/// unrounded probabilities, as in FlashAttention. fp32 tasks use true fp32 products, no TF32.
/// Limit: a tile that the mask cuts is multiplied whole, with P = 0 for its masked keys. A NaN or an infinity in V thus reaches rows of the
/// tile that do not see its key (0 * NaN and 0 * inf are NaN), in that column of the output; every row that does see it is right, and Q and
/// K have no such limit. Callers who need more must refuse such inputs.
/// Source of the update: Milakov & Gimelshein 2018, online softmax, algorithm 3.
///
/// With Submission::graph the first call of a list (same tasks, tiling and workspace) is eager, the second records, later ones replay.
/// Lists of too many launches stay eager, and so does all that the driver cannot record. The graphs' own memory is the driver's, not
/// counted here.
///
/// Owns streams, events, graphs and cuBLAS handles on the device that is current at construction; used by one host thread at a time, with
/// that device current. Waits for the device only in its destructor and before it drops an old graph; its destructor does not wait, and
/// leaves to the process's end what it owns, when an exception that came after its construction is on its way.
class CublasAttention {
 public:
  explicit CublasAttention(Submission submission = Submission::graph);
  CublasAttention(CublasAttention&&) noexcept;
  CublasAttention& operator=(CublasAttention&&) noexcept;
  CublasAttention(const CublasAttention&) = delete;
  CublasAttention& operator=(const CublasAttention&) = delete;
  ~CublasAttention();

  /// Bytes of workspace that attend() needs with this tiling.
  static std::int64_t workspace_bytes(const CublasTiling& tiling);

  /// Folds every task into its partial, in the order given where two tasks share rows. head_dim from 1 to 256, any strides with contiguous
  /// head_dim; partials are fp32. Work on `stream` enqueued before is finished before the first tile, work enqueued later waits for the
  /// last. Calls on different streams run one after the other, as they share the workspace.
  ///
  /// @param workspace  device memory, aligned to 256 bytes, workspace_bytes(tiling) long; in use until `stream` has passed this call
  /// @throws LibraryError if a call fails, std::invalid_argument if tiling or a task is out of range
  void attend(std::span<const AttendTask> tasks, const CublasTiling& tiling, void* workspace, std::int64_t bytes, CUstream_st* stream);

  /// Drops what is recorded for a workspace that is about to be freed.
  /// @throws LibraryError if the device has failed
  void forget(const void* workspace);

  /// Lists of tasks that are known, each of them a graph or on the way to become one.
  std::int64_t recordings() const;
  /// Calls so far that were the launch of a graph.
  std::int64_t graph_launches() const;

 private:
  class Implementation;
  int exceptions_at_start_ = std::uncaught_exceptions();
  std::unique_ptr<Implementation> implementation_;
};

/// The backward pass, of tiles of P = exp(S - LSE) and dS = scale P (dP - delta) with S = scale Q K^T and dP = dO V^T in fp32. In 16 bits a
/// kernel of our own makes both matrices at once from the operands, by tensor cores, where head_dim is 8, 16, ... 128 and rows are aligned
/// to 16 bytes; else they are written over two library products. Three library products follow, of P and dS in the operands' dtype:
/// dV += P^T dO, dK += dS^T Q, dQ += dS K (fp32). Tiles that add to the same rows follow each other on
/// one stream, so that sums have one order; streams share KV heads, segments and batch entries among them, so that one makes products while
/// another turns scores into probabilities. Nothing of q_rows x k_rows is kept.
///
/// Owns streams, events and cuBLAS handles of the device that is current at construction; used by one host thread at a time, with that
/// device current. Its destructor does not wait, and leaves to the process's end what it owns, when an exception that came after its
/// construction is on its way.
/// Source: Dao 2023, FlashAttention-2, algorithm 2, without its fusion.
class CublasGradients {
 public:
  CublasGradients();
  ~CublasGradients();
  CublasGradients(const CublasGradients&) = delete;
  CublasGradients& operator=(const CublasGradients&) = delete;

  /// Bytes of workspace that differentiate() needs with this tiling.
  static std::int64_t workspace_bytes(const CublasTiling& tiling);

  /// As GradientTask says, in fp32. Work on `stream` enqueued before is finished before the first tile, work enqueued later waits for the
  /// last.
  /// @param workspace  device memory, aligned to 256 bytes, workspace_bytes(tiling) long; in use until `stream` has passed this call
  /// @throws LibraryError if a call fails, std::invalid_argument if tiling or task is out of range
  void differentiate(const GradientTask& task, const CublasTiling& tiling, void* workspace, std::int64_t bytes, CUstream_st* stream);

 private:
  class Implementation;
  int exceptions_at_start_ = std::uncaught_exceptions();
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace annulus::kernels::cuda
