// SPDX-License-Identifier: Apache-2.0
// The operations in fp32 on CPUs: OpenMP over tiles, products by LIBXSMM or OpenBLAS, vector code for AVX2 and AVX-512 chosen at run
// time. Results do not depend on the number of threads.
#pragma once

#include <annulus/kernels/built_for.hpp>
#include <annulus/kernels/tasks.hpp>

#include <atomic>
#include <cstdint>
#include <string>

namespace annulus::kernels::cpu {

/// Largest number of query rows of a tile.
inline constexpr std::int64_t kMaxTileRows = 1024;

/// How the work is cut.
struct Settings {
  int threads = 1;                                 ///< OpenMP threads, >= 1
  std::int64_t tile_rows = 0;                      ///< query rows of a tile, up to kMaxTileRows; 0 is the default of 64
  std::atomic<std::uint64_t>* progress = nullptr;  ///< attend() adds to it while it works; may be null
};

/// Rows of a block of SegmentPlace for tiles of `tile_rows` (0: the default), a multiple of them and of the key tile; 0 if there is none up
/// to 256: the kernel then keeps no order of keys.
std::int64_t block_rows(std::int64_t tile_rows);

/// Whether this CPU has the instructions that the kernels need (AVX2 with FMA and F16C).
bool supported();

/// The vector instructions and the product library in use, for example "AVX2, LIBXSMM 1.17 (hsw)".
std::string describe();

/// Bytes of workspace that attend() needs for tasks of this head_dim: the tiles of all threads.
std::int64_t workspace_bytes(std::int64_t head_dim, const Settings& settings);

/// Sets a partial to the identity: acc [rows, head_dim] 0, max [rows] -inf, sum [rows] 0; fp32.
void fill_identity(const PartialPointers& partial, std::int64_t rows, std::int64_t head_dim, int threads);

/// As ZeroKeysTask says, fp32.
void add_zero_keys(const ZeroKeysTask& task);

/// Gathers rows as PackTask says; any element type, bits unchanged.
void pack(const PackTask& task, int threads);

/// Folds dense attention into a running fp32 partial as AttendTask says; q, k, v in task.dtype, widened to fp32 once per tile.
///
/// A row that sees no key is left untouched. A score of -inf contributes nothing; NaN and +inf make the row NaN.
/// Where rows have a place, tiles of queries and keys are cut at multiples of their size in the segment: the bits of a row depend on its
/// segment alone, however its keys are dealt out to tasks, if these are cut at multiples of block_rows() and come in the order of KeyPart.
/// place.block_rows must be 0 or block_rows(settings.tile_rows).
/// workspace: at least workspace_bytes(task.head_dim, settings) bytes, 64-byte aligned; nothing is in flight at return.
/// acc, max, sum and workspace must not alias q, k or v. kv head_dim is 1..kLargestHeadDim; k_positions.stride >= 1.
/// @throws std::runtime_error if the product library cannot serve a tile's shape, or the CPU is not supported()
/// Source: Milakov & Gimelshein 2018, online softmax, algorithm 3, a tile of keys at a time.
void attend(const AttendTask& task, const Settings& settings, void* workspace);

/// As BeginGradientsTask says, fp32.
void begin_gradients(const BeginGradientsTask& task, int threads);

/// Bytes of workspace that differentiate() needs for tasks of this head_dim: the tiles of all threads.
std::int64_t gradient_workspace_bytes(std::int64_t head_dim, const Settings& settings);

/// As GradientTask says, all of it in fp32, a tile of keys against a tile of queries at a time. Each tile of keys is one thread's; a row of
/// dQ takes its tiles in the order of the keys, so the bits do not depend on the number of threads. Tiles are of the kernel's own size.
/// workspace: at least gradient_workspace_bytes(head_dim, settings) bytes, 64-byte aligned; nothing is in flight at return.
/// @throws std::runtime_error as attend()
void differentiate(const GradientTask& task, const Settings& settings, void* workspace);

/// As ClearTask, AddTask and RoundTask say.
void clear(const ClearTask& task, int threads);
void add(const AddTask& task, int threads);
void round(const RoundTask& task, int threads);

/// Turns fp32 partials into out (task.dtype) and lse (fp32) as FinishTask says.
void finish(const FinishTask& task, int threads);

/// Measured fp32 FMA peak of `threads` threads together in GFLOP/s: registers only, widest vectors of this CPU, best of several
/// measurements of about 50 ms each.
/// @throws std::runtime_error if the CPU is not supported()
double fma_peak_gflops(int threads);

}  // namespace annulus::kernels::cpu
