// SPDX-License-Identifier: Apache-2.0
// The host's side of the fused kernel: from work records to tiles and tensor maps (pure arithmetic, no device), and the launch.
#pragma once

#include <annulus/kernels/dtype.hpp>
#include <annulus/kernels/fused_tile.hpp>
#include <annulus/kernels/tasks.hpp>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

struct CUstream_st;

namespace annulus::kernels::cuda::fused {

/// Q, K or V: [batch, rows, heads, head_dim], 16-bit elements, head_dim contiguous. Strides count elements and are multiples of 8; data is
/// device memory aligned to 16 bytes.
struct Operand {
  const void* data = nullptr;
  std::int64_t batches = 0;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t batch_stride = 0;
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
};

/// A contiguous [batch, rows, heads, head_dim].
Operand contiguous(const void* data, std::int64_t batches, std::int64_t rows, std::int64_t heads, std::int64_t head_dim);

enum class KeyOrder { cyclic, arrival };

/// Dense attention of a progression of query rows over a progression of key rows, for some heads of one batch entry. Row i of Q is row
/// q_first + i * q_stride of operand `q`. Query head (j, i), j < kv_heads, i < q_per_kv, is head q_head + j * q_head_step + i of operand
/// `q` and reads head k_head + j * k_head_step of operand `kv`.
struct Record {
  std::int64_t q_first = 0;
  std::int64_t k_first = 0;
  std::int64_t q_stride = 1;
  std::int64_t k_stride = 1;
  std::int32_t q_rows = 0;
  std::int32_t k_rows = 0;  ///< 0: its rows see none of them, and begin or end as `first` and `last` say
  std::int32_t q = 0;       ///< number of the operand
  std::int32_t kv = 0;      ///< number of K; V is the next
  std::int32_t q_batch = 0;
  std::int32_t k_batch = 0;
  std::int32_t q_head = 0;
  std::int32_t q_head_step = 1;
  std::int32_t k_head = 0;
  std::int32_t k_head_step = 1;
  std::int32_t kv_heads = 0;
  std::int32_t q_per_kv = 1;
  std::int32_t diagonal = 0;   ///< position of query row 0 minus position of key 0, counted in rows of their segment
  std::int32_t zero_keys = 0;  ///< of a last record: keys of score 0 and value 0 that its rows see besides, over all their records
  std::int64_t partial = 0;    ///< number of the partial of the first 64 rows of the first head: [j][i][ceil(q_rows / 64)]
  Mask mask = Mask::none;
  KeyPart part = KeyPart::all;
  KeyOrder order = KeyOrder::cyclic;
  bool first = true;  ///< nothing has been attended for these rows yet
  bool last = true;   ///< nothing comes after
};

/// A tensor map still without its address: rows of an operand seen as residue classes of `rate`, all of one length. Where the rate does not
/// divide the rows, the first classes are a row longer and have a map of their own.
struct MapRequest {
  std::int32_t operand = 0;
  std::int64_t rate = 1;
  bool longer = false;   ///< the classes that are a row longer
  std::int32_t box = 0;  ///< rows of a copy
  bool operator==(const MapRequest&) const = default;
};

struct TileList {
  std::vector<Tile> tiles;
  std::vector<MapRequest> maps;
};

/// Number of the shape in kTileShapes that serves head_dim, or -1: above 256, or not a multiple of 8.
int shape_of(std::int64_t head_dim);

/// Maps that one launch can use.
inline constexpr int kMaxMaps = 64;

/// Tiles of all records, in the order in which blocks should draw them: the longest first; where those of one head differ in length, inside
/// sections of heads whose keys and values stay in the L2 cache. O is [batch, rows, heads, head_dim] like the Q operand of the record, LSE
/// [batch, heads, rows]. Rows of two records with the same `partial` must not be among them. One list for a launch: a new one begins where
/// the records need more than kMaxMaps maps.
/// @throws std::invalid_argument if an extent is out of range
std::vector<TileList> make_tiles(std::span<const Record> records, std::span<const Operand> operands, std::int64_t head_dim);

/// Bytes of `count` partials of 64 rows.
std::int64_t partial_bytes(std::int64_t head_dim, std::int64_t count);

/// Rows of a query tile.
int tile_rows(std::int64_t head_dim);

/// Where the partials of some rows of one query head lie: of `segments` times `count` rows, row i of segment s being row
/// first + s * segment_stride + i * stride of O. Its rows lie 64 to a partial, from number partial + batch * batch_step + s * segment_step
/// on.
struct CombineEntry {
  std::int64_t first = 0;
  std::int64_t stride = 1;
  std::int64_t count = 0;
  std::int64_t segments = 1;
  std::int64_t segment_stride = 0;
  std::int64_t partial = 0;
  std::int64_t batch_step = 0;
  std::int64_t segment_step = 0;
  std::int64_t zero_keys = 0;  ///< keys of score 0 and value 0 that each of the rows sees besides
  bool extra = false;          ///< of the keys that every row sees, as FinishTask::extra; else of a branch
};

/// Turns partials into rows of O and LSE, as FinishTask says: combined in the order of the entries, rounded once; O 0 and LSE -inf where no
/// entry holds a key. Pointers are device memory.
struct CombineTask {
  DType dtype = DType::bf16;
  Combine combine = Combine::lse;
  std::int64_t batch = 0;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  float output_scale = 1.0F;
  const void* partial = nullptr;          ///< float4, as Arguments::partial
  const CombineEntry* entries = nullptr;  ///< by head, those of extra keys last
  const std::int32_t* begin = nullptr;    ///< [heads + 1]: where the entries of a head begin
  void* out = nullptr;                    ///< [batch, rows, heads, head_dim]
  float* lse = nullptr;                   ///< [batch, heads, rows]
};

/// Enqueues it. `task` is read before it returns.
/// @throws LibraryError if the launch fails
void combine(const CombineTask& task, CUstream_st* stream);

class Launcher {
 public:
  /// @param operands  as for make_tiles; the addresses go into tensor maps now
  /// @throws LibraryError if the driver refuses a map
  Launcher(const TileList& list, std::span<const Operand> operands, DType dtype, std::int64_t head_dim);
  Launcher(Launcher&&) noexcept;
  Launcher& operator=(Launcher&&) noexcept;
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;
  ~Launcher();

  /// Enqueues the kernel on `stream`; all memory of `args` stays in use until the stream has passed it. Returns the tickets that it draws.
  /// @param blocks  at most one for each SM of the current device
  /// @throws LibraryError if the launch fails
  std::int32_t launch(const Arguments& args, int blocks, CUstream_st* stream) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace annulus::kernels::cuda::fused
