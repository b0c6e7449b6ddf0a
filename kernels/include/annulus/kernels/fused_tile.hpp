// SPDX-License-Identifier: Apache-2.0
// What the fused kernel is built for and what it is told: shapes of tiles, one table; the work of one tile, as plain data.
#pragma once

#include <cstdint>

namespace annulus::kernels::cuda::fused {

/// How one head_dim is computed. A query tile is 64 rows for each consumer warpgroup, a key tile `keys` rows, a power of two.
struct TileShape {
  int head_dim;             ///< a multiple of 8; smaller ones that are multiples of 8 use the next shape
  int warpgroups;           ///< consumers, 2 to 4; one more warpgroup copies
  int keys;                 ///< rows of a key tile
  int stages;               ///< key tiles in flight, and as many of V
  bool query_in_registers;  ///< Q is the register operand of the scores
};

/// The one table. A shape stands or falls with registers and shared memory: README.md of this folder says what each line gave up.
inline constexpr TileShape kTileShapes[] = {
    {.head_dim = 16, .warpgroups = 3, .keys = 128, .stages = 4, .query_in_registers = true},
    {.head_dim = 24, .warpgroups = 4, .keys = 64, .stages = 4, .query_in_registers = true},
    {.head_dim = 32, .warpgroups = 3, .keys = 128, .stages = 4, .query_in_registers = true},
    {.head_dim = 48, .warpgroups = 3, .keys = 128, .stages = 4, .query_in_registers = true},
    {.head_dim = 64, .warpgroups = 3, .keys = 128, .stages = 4, .query_in_registers = false},
    {.head_dim = 96, .warpgroups = 2, .keys = 128, .stages = 3, .query_in_registers = true},
    {.head_dim = 128, .warpgroups = 2, .keys = 128, .stages = 3, .query_in_registers = true},
    {.head_dim = 256, .warpgroups = 2, .keys = 64, .stages = 2, .query_in_registers = false},
};

/// Rows of a warpgroup's part of a query tile.
inline constexpr int kGroupRows = 64;

/// A row's own place among the keys is counted in blocks of this many rows; a multiple of every key tile.
inline constexpr int kBlockRows = 128;

/// Which of its keys a tile visits, and how. A row goes down from the end of its own block to key 0, then from the last key down to its
/// own block: `down` and `above` are the two halves. Keys are visited a key tile at a time.
enum TileFlags : std::int32_t {
  kFirst = 1,    ///< nothing has been attended yet: the partial that is there is not read
  kLast = 2,     ///< nothing comes after: writes O and LSE instead of the partial
  kCausal = 4,   ///< row i sees key j iff j <= i + diagonal
  kArrival = 8,  ///< rows have no own place: from the last key down to key 0
  kDown = 16,    ///< the own block and what lies below it only
  kAbove = 32,   ///< what lies above the own block only
};

/// Most consumer warpgroups of a shape.
inline constexpr int kMaxGroups = 4;

/// The work of one query tile: at most 64 x warpgroups rows of one query head against a range of rows of one KV head.
/// Rows are told as tensor maps see them: number `row` of residue class `residue` (tensor_maps.hpp). Key tiles are streamed from number
/// `start` down, and below 0 from the last on. Warpgroups whose rows lie in different blocks start at different key tiles: the stream
/// serves the last one first, the others join when it comes to them.
struct Tile {
  std::int32_t q_map = 0;   ///< map of Q
  std::int32_t kv_map = 0;  ///< map of K; V's is the next
  std::int32_t q_row = 0;
  std::int32_t q_residue = 0;
  std::int32_t q_batch = 0;
  std::int32_t q_head = 0;
  std::int32_t k_row = 0;
  std::int32_t k_residue = 0;
  std::int32_t k_batch = 0;
  std::int32_t k_head = 0;
  std::int32_t q_rows = 0;    ///< rows from q_row on that belong to the work; more than a tile holds is fine
  std::int32_t k_rows = 0;    ///< keys from k_row on
  std::int32_t diagonal = 0;  ///< position of row 0 minus position of key 0, in rows of the segment
  std::int32_t flags = 0;     ///< TileFlags
  std::int64_t out = 0;       ///< element of O where row 0 begins
  std::int64_t out_pitch = 0;
  std::int64_t lse = 0;  ///< element of LSE of row 0
  std::int64_t lse_pitch = 0;
  std::int32_t start = 0;               ///< key tile streamed first
  std::int32_t length = 0;              ///< key tiles streamed
  std::int32_t count[kMaxGroups] = {};  ///< key tiles that each warpgroup computes,
  std::uint8_t skip[kMaxGroups] = {};   ///< after these of the stream
  std::int32_t zero_keys = 0;           ///< kLast: keys of score 0 and value 0 that the rows see besides
  std::int64_t partial = 0;             ///< first float4 of the partial of row 0's warpgroup; those of the next warpgroups follow
};
static_assert(sizeof(Tile) == 128 && sizeof(Tile) % 16 == 0, "copied 16 bytes at a time");

/// float4 that the partial of 64 rows takes: O in the order of registers, then (maximum, maximum, sum, sum) of each lane's two rows.
constexpr std::int64_t partial_vectors(int head_dim) { return static_cast<std::int64_t>(head_dim / 8 + 1) * 128; }

/// FLOPs of the tensor cores of one multiprocessor of Hopper in a clock cycle, 16-bit operands and sums in fp32.
inline constexpr double kFlopsPerCycle = 4096;

/// What a launch works on. Pointers are device memory.
struct Arguments {
  const Tile* tiles;
  std::int32_t tile_count;
  std::int32_t ticket_base;    ///< value of *ticket at the launch
  std::int32_t* ticket;        ///< drawn from; a launch adds tile_count + its blocks
  std::uint32_t* redo;         ///< [tile_count][2] (warps that must do their rows again, next tile of the block's list); zero at rest
  unsigned long long* cycles;  ///< if not null: raised to the clock cycles of the slowest block
  void* out;
  float* lse;
  void* partial;          ///< float4
  float scale_log2;       ///< scale * log2(e)
  std::int32_t head_dim;  ///< columns of O that exist
};

}  // namespace annulus::kernels::cuda::fused
