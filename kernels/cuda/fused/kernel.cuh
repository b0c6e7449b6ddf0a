// SPDX-License-Identifier: Apache-2.0
// The fused attention kernel for Hopper: scores, softmax and the product with V in one pass, nothing but Q, K, V, O and the carried partial
// in memory. One block an SM. Its last warpgroup copies: tile after tile, drawn by tickets, it brings Q and streams K and V through rings
// of stages. The others compute, 64 query rows each: while P V of one key tile is in the tensor cores, the exponentials of the next are
// made.
//
// The maximum that is kept. A row's scores are scaled by the largest score of the first key tile in which the row sees a key, and by that
// from then on, so the running output is never rescaled. Exact unless a row's later scores rise so far that a sum leaves the safe range:
// the lanes' sums show it at the end of a tile, the warp then writes nothing, and the block does the tile again, carefully, after its last
// ticket. The careful pass uses the same instructions in the same order and raises a row's maximum before any key tile whose own sums pass
// the threshold. What it decides depends on the row's state and that key tile alone, so neither where calls end nor how rows are tiled
// changes a bit.
//
// Sources: Dao et al. 2022 (tiled exact attention), Shah et al. 2024 (warp specialisation and overlap on Hopper), Milakov & Gimelshein 2018
// (online softmax).
#pragma once

#include <annulus/kernels/fused_tile.hpp>

#include "element.cuh"
#include "ptx.cuh"
#include "tensor_maps.hpp"
#include "wgmma.cuh"
#include "zero_keys.cuh"

#include <cuda_runtime.h>

namespace annulus::kernels::cuda::fused {

/// A sum past this, of one lane over one key tile, raises the row's maximum. bf16 reaches as far as fp32; probabilities in fp16 must stay
/// below 65504.
template <class Element>
inline constexpr float kSumLimit = 0x1p64F;
template <>
inline constexpr float kSumLimit<__half> = 0x1p14F;
/// False for a NaN too.
template <class Element>
__device__ __forceinline__ bool within(float sum) {
  return sum >= 0.0F && sum <= kSumLimit<Element>;
}

/// Constants of a shape, and its shared memory: Q of each warpgroup, stages of K, stages of V, work slots, barriers. Operands lie in panels
/// of 64 columns: rows of 128 bytes, swizzled; columns past head_dim are zero.
template <int kIndex>
struct Plan {
  static constexpr TileShape kShape = kTileShapes[kIndex];
  static constexpr int kHeadDim = kShape.head_dim;
  static constexpr int kGroups = kShape.warpgroups;
  static constexpr int kKeys = kShape.keys;
  static constexpr int kStages = kShape.stages;
  static constexpr bool kQueryInRegisters = kShape.query_in_registers;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kWarps = 4 * kGroups;
  static constexpr int kPanels = (kHeadDim + 63) / 64;
  static constexpr int kSteps = (kHeadDim + 15) / 16;  // of 16 columns, in Q K^T
  static constexpr int kRowBytes = 128;
  static constexpr int kQueryBytes = kGroupRows * kRowBytes * kPanels;
  static constexpr int kKeyBytes = kKeys * kRowBytes * kPanels;
  static constexpr int kPartialVectors = static_cast<int>(partial_vectors(kHeadDim));

  static constexpr bool kPrefetchesPartials = kHeadDim <= 128;  // nothing was gained at 256, where a partial is twice as large

  static constexpr int kSlots = 4;  // work records in flight
  static constexpr int kQueryAt = 0;
  static constexpr int kKeyAt = kQueryAt + kGroups * kQueryBytes;
  static constexpr int kValueAt = kKeyAt + kStages * kKeyBytes;
  static constexpr int kSlotAt = kValueAt + kStages * kKeyBytes;
  static constexpr int kSlotBytes = sizeof(Tile) + 16;
  static constexpr int kBarrierAt = kSlotAt + kSlots * kSlotBytes;
  static constexpr int kBarriers = 5 * kStages + 2 * kGroups + 2 * kSlots + 1;
  static constexpr int kListAt = kBarrierAt + 8 * kBarriers;
  static constexpr int kBytes = kListAt + 16;

  // Of 64 Ki registers a launch bound of one block gives every thread the same share, a multiple of 8, to begin with; the sum stays the
  // same.
  static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : kGroups == 3 ? 160 : 112;

  static_assert(kBlockRows % kKeys == 0);
  static_assert(kBytes <= 227 * 1024, "shared memory of an SM");
};

/// What a slot tells besides its tile.
enum SlotMode : std::int32_t { kCompute = 0, kDrain = -1, kStop = -2 };  // positive: redo, the warps that write
struct Slot {
  Tile tile;
  std::int32_t index;  // of the tile in the list
  std::int32_t mode;
  std::int32_t unused[2];
};
static_assert(sizeof(Slot) == sizeof(Tile) + 16);

/// Names of places in shared memory.
template <int kIndex>
struct Places {
  using P = Plan<kIndex>;
  std::uint8_t* base;  // aligned to the 1024 bytes after which the swizzle repeats
  SharedAddress at;

  __device__ SharedAddress query(int group) const { return at + P::kQueryAt + group * P::kQueryBytes; }
  __device__ SharedAddress key(int stage) const { return at + P::kKeyAt + stage * P::kKeyBytes; }
  __device__ SharedAddress value(int stage) const { return at + P::kValueAt + stage * P::kKeyBytes; }
  __device__ Slot& slot(int n) const { return reinterpret_cast<Slot*>(base + P::kSlotAt)[n % P::kSlots]; }
  __device__ SharedAddress barrier(int number) const { return at + P::kBarrierAt + 8 * number; }
  __device__ SharedAddress key_full(int stage) const { return barrier(stage); }
  __device__ SharedAddress key_empty(int stage) const { return barrier(P::kStages + stage); }
  __device__ SharedAddress value_full(int stage) const { return barrier(2 * P::kStages + stage); }
  __device__ SharedAddress value_empty(int stage) const { return barrier(3 * P::kStages + stage); }
  __device__ SharedAddress query_full(int group) const { return barrier(4 * P::kStages + group); }
  __device__ SharedAddress query_empty(int group) const { return barrier(4 * P::kStages + P::kGroups + group); }
  __device__ SharedAddress slot_full(int n) const { return barrier(4 * P::kStages + 2 * P::kGroups + n % P::kSlots); }
  __device__ SharedAddress slot_empty(int n) const { return barrier(4 * P::kStages + 2 * P::kGroups + P::kSlots + n % P::kSlots); }
  __device__ SharedAddress tail_full(int stage) const { return barrier(4 * P::kStages + 2 * P::kGroups + 2 * P::kSlots + stage); }
  __device__ SharedAddress drained() const { return barrier(P::kBarriers - 1); }
  /// Head of the block's list of tiles to do again, -1 if there is none; and the clock at the start.
  __device__ std::int32_t* redo_head() const { return reinterpret_cast<std::int32_t*>(base + P::kListAt); }
  __device__ long long* start() const { return reinterpret_cast<long long*>(base + P::kListAt + 8); }

  __device__ void initialise() const {
    for (int i = 0; i < P::kStages; ++i) {
      barrier_init(key_full(i), 1);
      barrier_init(key_empty(i), P::kWarps);
      barrier_init(value_full(i), 1);
      barrier_init(value_empty(i), P::kWarps);
      barrier_init(tail_full(i), 1);
    }
    for (int i = 0; i < P::kGroups; ++i) {
      barrier_init(query_full(i), 1);
      barrier_init(query_empty(i), 4);
    }
    for (int i = 0; i < P::kSlots; ++i) {
      barrier_init(slot_full(i), 2);  // what stands in the slot, and the tile
      barrier_init(slot_empty(i), P::kWarps + 1);
    }
    barrier_init(drained(), P::kWarps);
    *redo_head() = -1;
    *start() = clock64();
    barrier_init_fence();
  }
};

/// What all lanes of a warp hold alike, told to the assembler: unless it knows, all that is counted by loops of such lengths, the stage and
/// with it every descriptor of a product, is computed in each lane.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0U, value, 0); }

/// The key tile streamed after this one: the one below, and below 0 the last.
template <int kIndex>
__device__ int next_key_tile(const Tile& tile, int key_tile) {
  return key_tile > 0 ? key_tile - 1 : (tile.k_rows + Plan<kIndex>::kKeys - 1) / Plan<kIndex>::kKeys - 1;
}
/// Whether rows past the last key lie in this key tile.
template <int kIndex>
__device__ bool ragged(const Tile& tile, int key_tile) {
  return (key_tile + 1) * Plan<kIndex>::kKeys > tile.k_rows;
}

/// Position in the rings of K and V: a stage, and the parity of its present use.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ void advance() {
    const bool around = stage == kStages - 1;
    stage = around ? 0 : stage + 1;
    parity ^= around ? 1U : 0U;
  }
};

// --- The warpgroup that copies: one thread of it -----------------------------------------------------------------------------------

template <int kIndex>
struct Producer {
  using P = Plan<kIndex>;
  const TensorMaps& maps;
  const Arguments& args;
  const Places<kIndex>& places;
  Ring<P::kStages> ring{};
  int posted = 0;    // slots filled so far
  int streamed = 0;  // tiles copied so far

  __device__ int draw() const { return atomicAdd(args.ticket, 1) - args.ticket_base; }

  /// Fills the next slot: with tile `index`, on its way at return, if mode >= 0.
  __device__ void post(int index, int mode) {
    barrier_wait(places.slot_empty(posted), ((posted / P::kSlots) & 1) ^ 1);
    Slot& slot = places.slot(posted);
    slot.index = index;
    slot.mode = mode;
    barrier_arrive(places.slot_full(posted));
    if (mode >= 0) {
      const SharedAddress to = shared_address(&slot.tile);
      const auto* from = reinterpret_cast<const std::uint8_t*>(args.tiles + index);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Tile)); i += 16) { copy_16_bytes(to + i, from + i); }
      barrier_arrive_after_copies(places.slot_full(posted));
    } else {
      barrier_arrive(places.slot_full(posted));
    }
    ++posted;
  }

  __device__ void copy_keys(const Tile& tile, const CUtensorMap* map, int key_tile, SharedAddress to, SharedAddress full,
                            SharedAddress empty, std::uint32_t parity) const {
    barrier_wait(empty, parity ^ 1);
    barrier_expect(full, P::kKeyBytes);
    for (int panel = 0; panel < P::kPanels; ++panel) {
      copy_box(to + panel * P::kKeys * P::kRowBytes, map, full,
               {64 * panel, tile.k_head, tile.k_row + key_tile * P::kKeys, tile.k_residue, tile.k_batch});
    }
  }

  /// Copies what slot `n` needs: Q of all warpgroups, then K and V in the order of need: K0, K1, V0, K2, V1, .. On the way, if `draws`, it
  /// draws the next tile and posts it, and returns its index: so late that the block which is free first gets the longest tile left, and so
  /// early that neither the ticket nor the tile is waited for.
  __device__ int stream(int n, bool draws) {
    barrier_wait(places.slot_full(n), (n / P::kSlots) & 1);
    const Tile& tile = places.slot(n).tile;
    for (int group = 0; group < P::kGroups; ++group) {
      barrier_wait(places.query_empty(group), (streamed & 1) ^ 1);
      barrier_expect(places.query_full(group), P::kQueryBytes);
      for (int panel = 0; panel < P::kPanels; ++panel) {
        copy_box(places.query(group) + panel * kGroupRows * P::kRowBytes, &maps.map[tile.q_map], places.query_full(group),
                 {64 * panel, tile.q_head, tile.q_row + kGroupRows * group, tile.q_residue, tile.q_batch});
      }
    }
    ++streamed;
    const int length = tile.length;
    const CUtensorMap* keys = &maps.map[tile.kv_map];
    const CUtensorMap* values = &maps.map[tile.kv_map + 1];
    int key_tile = tile.start;
    Ring<P::kStages> ahead = ring;
    auto copy_k = [&] {
      copy_keys(tile, keys, key_tile, places.key(ahead.stage), places.key_full(ahead.stage), places.key_empty(ahead.stage), ahead.parity);
      ahead.advance();
    };
    constexpr int kDrawAhead = 4;  // key tiles before the last
    constexpr int kPostAhead = 2;
    const int draw_at = max(length - 1 - kDrawAhead, 0);
    const int post_at = max(length - 1 - kPostAhead, 0);
    int following = -1;
    if (length > 0) { copy_k(); }
    for (int i = 0; i < max(length, 1); ++i) {
      if (draws && i == draw_at) { following = draw(); }
      if (draws && i == post_at) { post_drawn(following); }
      if (length == 0) { break; }
      const int value_tile = key_tile;
      if (i + 1 < length) {
        key_tile = next_key_tile<kIndex>(tile, key_tile);
        copy_k();
      }
      const SharedAddress full = ragged<kIndex>(tile, value_tile) ? places.tail_full(ring.stage) : places.value_full(ring.stage);
      copy_keys(tile, values, value_tile, places.value(ring.stage), full, places.value_empty(ring.stage), ring.parity);
      ring.advance();
    }
    return following;
  }

  __device__ void post_drawn(int index) { post(index, index < args.tile_count ? kCompute : kDrain); }

  __device__ void run() {
    int index = draw();
    post_drawn(index);
    for (int n = 0; index < args.tile_count; ++n) { index = stream(n, true); }
    barrier_wait(places.drained(), 0);
    for (int again = *places.redo_head(); again >= 0;) {
      std::uint32_t* entry = args.redo + 2 * static_cast<std::int64_t>(again);
      const int warps = static_cast<int>(atomicExch(entry, 0U));
      const int next = static_cast<int>(atomicAdd(entry + 1, 0U));
      post(again, warps);
      stream(posted - 1, false);
      again = next;
    }
    post(-1, kStop);
  }
};

/// One more warp of the same warpgroup. It asks for the partial that a tile will continue as soon as the tile is known, so that the
/// warpgroups find it in the L2 cache. And rows of V past the last key may hold anything, and a probability of zero times a NaN is a NaN:
/// it waits for such a tile in the consumers' stead, sets those rows to zero and hands the tile on.
template <int kIndex>
__device__ __forceinline__ void sweep(const Arguments& args, const Places<kIndex>& places) {
  using P = Plan<kIndex>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Ring<P::kStages> ring;
  unsigned parities = 0;  // of the next tail in each stage, a bit for each
  for (int n = 0;; ++n) {
    barrier_wait(places.slot_full(n), (n / P::kSlots) & 1);
    const Slot& slot = places.slot(n);
    const int mode = slot.mode;
    if (mode == kStop) { return; }
    if (mode != kDrain) {
      const Tile& tile = slot.tile;
      if (P::kPrefetchesPartials && (tile.flags & kFirst) == 0 && lane < P::kGroups && lane * kGroupRows < tile.q_rows) {
        const auto* const partial = static_cast<const float4*>(args.partial) + tile.partial + lane * P::kPartialVectors;
        prefetch_to_l2(partial, P::kPartialVectors * sizeof(float4));
      }
      const int length = tile.length;
      int key_tile = tile.start;
      for (int i = 0; i < length; ++i, ring.advance(), key_tile = next_key_tile<kIndex>(tile, key_tile)) {
        if (!ragged<kIndex>(tile, key_tile)) { continue; }
        barrier_wait(places.tail_full(ring.stage), parities >> ring.stage & 1U);
        parities ^= 1U << ring.stage;
        const int kept = tile.k_rows % P::kKeys;
        for (int panel = 0; panel < P::kPanels; ++panel) {
          const SharedAddress rows = places.value(ring.stage) + panel * P::kKeys * P::kRowBytes;
          for (int at = kept * P::kRowBytes + lane * 16; at < P::kKeys * P::kRowBytes; at += 32 * 16) { store_zeros(rows + at); }
        }
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) { barrier_arrive(places.value_full(ring.stage)); }
      }
    }
    __syncwarp();
    if (lane == 0) { barrier_arrive(places.slot_empty(n)); }
  }
}

// --- The warpgroups that compute ---------------------------------------------------------------------------------------------------

template <class Element, int kIndex>
__device__ __forceinline__ void consume(const Arguments& args, const Places<kIndex>& places, const int group) {
  using P = Plan<kIndex>;
  constexpr int kHeadDim = P::kHeadDim;
  constexpr int kKeys = P::kKeys;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % 32;
  const int warp = group * 4 + uniform(thread / 32);
  const int quad = lane % 4;
  const int row = group * kGroupRows + thread / 32 * 16 + lane / 4;  // this lane's rows of the tile: this one and the one 8 below
  const float c = args.scale_log2;

  float o[kHeadDim / 2];
  float s[kKeys / 2];
  std::uint32_t p[kKeys / 4];
  std::uint32_t q[P::kSteps * 4];  // unused registers vanish where Q stays in shared memory

  Ring<P::kStages> ring;
  auto release = [&](SharedAddress barrier) {
    if (lane == 0) { barrier_arrive(barrier); }
  };

  for (int n = 0;; ++n) {
    barrier_wait(places.slot_full(n), (n / P::kSlots) & 1);
    const Slot& slot = places.slot(n);
    const int mode = uniform(slot.mode);
    if (mode == kStop) { break; }
    if (mode == kDrain) {
      __syncwarp();
      release(places.slot_empty(n));
      release(places.drained());
      continue;
    }
    const bool careful = mode != kCompute;
    const Tile& tile = slot.tile;
    const int skip = uniform(tile.skip[group]);
    const int count = uniform(tile.count[group]);
    // Keys below this are seen by all rows of the warpgroup.
    const int unmasked = uniform((tile.flags & kCausal) != 0 ? min(tile.k_rows, tile.diagonal + group * kGroupRows + 1) : tile.k_rows);

    // The state that comes in. b is the maximum times c, or 0 with its bit in `unset` if the row has seen no key; l are this lane's sums.
    float b0;
    float b1;
    float l0;
    float l1;
    const bool carried = (tile.flags & kFirst) == 0 && group * kGroupRows < tile.q_rows && (count > 0 || (tile.flags & kLast) != 0);
    const float4* const carry = static_cast<const float4*>(args.partial) + tile.partial + group * P::kPartialVectors + thread;
    load_or_zero(b0, b1, l0, l1, carry + kHeadDim / 8 * 128, carried);
#pragma unroll
    for (int g = 0; g < kHeadDim / 8; ++g) { load_or_zero(o[4 * g], o[4 * g + 1], o[4 * g + 2], o[4 * g + 3], carry + g * 128, carried); }
    unsigned unset = !carried ? 3U : (b0 == -INFINITY ? 1U : 0U) | (b1 == -INFINITY ? 2U : 0U);
    b0 = b0 == -INFINITY ? 0.0F : b0;
    b1 = b1 == -INFINITY ? 0.0F : b1;
    // A row that does not exist need not look for its maximum.
    unset &= (row < tile.q_rows ? 1U : 0U) | (row + 8 < tile.q_rows ? 2U : 0U);

    // --- the pieces of a step ---
    auto issue_scores = [&](int stage) {
      const MatrixDescriptor keys(places.key(0), 16, 8 * P::kRowBytes, Swizzle::bytes128);
      const MatrixDescriptor queries_at(places.query(group), 16, 8 * P::kRowBytes, Swizzle::bytes128);
#pragma unroll
      for (int step = 0; step < P::kSteps; ++step) {
        const int panel = step / 4;
        const int within = step % 4 * 32;
        const std::uint64_t b = keys.at(stage * P::kKeyBytes + panel * kKeys * P::kRowBytes + within);
        if constexpr (P::kQueryInRegisters) {
          Product<Element, kKeys>::register_a(s, q + 4 * step, b, step != 0 ? 1 : 0);
        } else {
          Product<Element, kKeys>::shared_a(s, queries_at.at(panel * kGroupRows * P::kRowBytes + within), b, step != 0 ? 1 : 0);
        }
      }
      products_commit();
    };
    auto issue_output = [&](int stage) {
      const MatrixDescriptor values(places.value(0), kKeys * P::kRowBytes, 8 * P::kRowBytes, Swizzle::bytes128);
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
        Product<Element, kHeadDim>::register_a_by(o, p + 4 * step, values.at(stage * P::kKeyBytes + step * 16 * P::kRowBytes));
      }
      products_commit();
    };
    auto mask = [&](int key_tile) {
      if ((key_tile + 1) * kKeys <= unmasked) { return; }
      const int first = key_tile * kKeys + 2 * quad;
      const bool causal = (tile.flags & kCausal) != 0;
      const int limit0 = (causal ? min(tile.k_rows, tile.diagonal + row + 1) : tile.k_rows) - first;
      const int limit1 = (causal ? min(tile.k_rows, tile.diagonal + row + 9) : tile.k_rows) - first;
#pragma unroll
      for (int g = 0; g < kKeys / 8; ++g) {
        if (8 * g >= limit0) { s[4 * g] = -INFINITY; }
        if (8 * g + 1 >= limit0) { s[4 * g + 1] = -INFINITY; }
        if (8 * g >= limit1) { s[4 * g + 2] = -INFINITY; }
        if (8 * g + 1 >= limit1) { s[4 * g + 3] = -INFINITY; }
      }
    };
    /// Largest score of each row, over the four lanes that share it.
    auto largest = [&](float& x0, float& x1) {
      x0 = fmaxf(s[0], s[1]), x1 = fmaxf(s[2], s[3]);
#pragma unroll
      for (int g = 1; g < kKeys / 8; ++g) {
        x0 = fmaxf(x0, fmaxf(s[4 * g], s[4 * g + 1]));
        x1 = fmaxf(x1, fmaxf(s[4 * g + 2], s[4 * g + 3]));
      }
      x0 = fmaxf(x0, __shfl_xor_sync(~0U, x0, 1)), x1 = fmaxf(x1, __shfl_xor_sync(~0U, x1, 1));
      x0 = fmaxf(x0, __shfl_xor_sync(~0U, x0, 2)), x1 = fmaxf(x1, __shfl_xor_sync(~0U, x1, 2));
    };
    /// Rows that have seen no key yet take the largest score of this tile as their maximum.
    auto settle = [&] {
      if (!__any_sync(~0U, unset != 0)) { return; }
      float x0;
      float x1;
      largest(x0, x1);
      if ((unset & 1U) != 0 && x0 != -INFINITY) { b0 = x0 * c, unset &= ~1U; }
      if ((unset & 2U) != 0 && x1 != -INFINITY) { b1 = x1 * c, unset &= ~2U; }
    };
    auto probability = [&](int i) {
      const float x = fmaf(s[i], c, (i & 2) == 0 ? -b0 : -b1);
      return exp2_fast(x);
    };
    /// Scores to probabilities, and this lane's sums of them.
    auto exponentials = [&](float& t0, float& t1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) { s[i] = probability(i); }
      t0 = s[0], t1 = s[2];
      float u0 = s[1];
      float u1 = s[3];
#pragma unroll
      for (int g = 1; g < kKeys / 8; ++g) {
#pragma unroll
        for (int e = 0; e < 4; ++e) { s[4 * g + e] = probability(4 * g + e); }
        t0 += s[4 * g], u0 += s[4 * g + 1], t1 += s[4 * g + 2], u1 += s[4 * g + 3];
      }
      t0 += u0, t1 += u1;
    };
    /// The same sums, and the scores stay.
    auto sums = [&](float& t0, float& t1) {
      t0 = probability(0), t1 = probability(2);
      float u0 = probability(1);
      float u1 = probability(3);
#pragma unroll
      for (int g = 1; g < kKeys / 8; ++g) {
        t0 += probability(4 * g), u0 += probability(4 * g + 1), t1 += probability(4 * g + 2), u1 += probability(4 * g + 3);
      }
      t0 += u0, t1 += u1;
    };
    /// Careful pass: raises the maximum of rows for which this tile's sums, one lane's is enough, would leave the safe range.
    auto raise = [&] {
      products_wait<0>();  // O is touched
      pin(o);
      float t0;
      float t1;
      sums(t0, t1);
      int over = (within<Element>(t0) ? 0 : 1) | (within<Element>(t1) ? 0 : 2);
      over |= __shfl_xor_sync(~0U, over, 1);
      over |= __shfl_xor_sync(~0U, over, 2);
      if (__any_sync(~0U, over != 0)) {
        float x0;
        float x1;
        largest(x0, x1);
        x0 = (over & 1) != 0 ? x0 * c : b0, x1 = (over & 2) != 0 ? x1 * c : b1;
        const float a0 = (over & 1) != 0 ? exp2_fast(b0 - x0) : 1.0F;
        const float a1 = (over & 2) != 0 ? exp2_fast(b1 - x1) : 1.0F;
        b0 = x0, b1 = x1;
        l0 *= a0, l1 *= a1;
#pragma unroll
        for (int g = 0; g < kHeadDim / 8; ++g) { o[4 * g] *= a0, o[4 * g + 1] *= a0, o[4 * g + 2] *= a1, o[4 * g + 3] *= a1; }
      }
      pin(s);  // else the compiler would keep the exponentials of sums()
    };
    auto softmax = [&](int key_tile) {
      mask(key_tile);
      settle();
      if (careful) { raise(); }
      float t0;
      float t1;
      exponentials(t0, t1);
      l0 += t0, l1 += t1;
    };
    auto convert = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) { p[i] = pack_pair<Element>(s[2 * i], s[2 * i + 1]); }
    };
    auto pass_over = [&](int steps) {
      for (int i = 0; i < steps; ++i, ring.advance()) {
        barrier_wait(places.key_full(ring.stage), ring.parity);
        release(places.key_empty(ring.stage));
        barrier_wait(places.value_full(ring.stage), ring.parity);
        release(places.value_empty(ring.stage));
      }
    };
    auto release_query = [&] {
      if constexpr (!P::kQueryInRegisters) { release(places.query_empty(group)); }
    };

    // Every slot but the drain, which stands before the careful ones, has brought a Q.
    barrier_wait(places.query_full(group), (careful ? n - 1 : n) & 1);
    if constexpr (P::kQueryInRegisters) {
      const int query_row = thread / 32 * 16 + lane % 16;
#pragma unroll
      for (int step = 0; step < P::kSteps; ++step) {
        const std::uint32_t chunk = step * 2 % 8 + lane / 16;
        load_matrices(q + 4 * step,
                      places.query(group) + (step / 4 * kGroupRows + query_row) * P::kRowBytes + ((chunk ^ (query_row & 7)) << 4));
      }
      async_proxy_fence();
      __syncwarp();
      release(places.query_empty(group));
    }

    pass_over(skip);
    int key_tile = uniform(tile.start);
    for (int i = 0; i < skip; ++i) { key_tile = next_key_tile<kIndex>(tile, key_tile); }

    if (count > 0) {
      barrier_wait(places.key_full(ring.stage), ring.parity);
      products_fence();
      issue_scores(ring.stage);
      products_wait<0>();
      pin(s);
      release(places.key_empty(ring.stage));
      if (count == 1) { release_query(); }
      softmax(key_tile);
      convert();
      barrier_wait(places.value_full(ring.stage), ring.parity);

      for (int i = 1; i < count; ++i) {
        const int previous = ring.stage;
        ring.advance();
        key_tile = next_key_tile<kIndex>(tile, key_tile);
        barrier_wait(places.key_full(ring.stage), ring.parity);
        pin(s);
        pin(o);
        products_fence();
        issue_scores(ring.stage);
        products_fence();
        issue_output(previous);
        products_wait<1>();
        pin(s);
        release(places.key_empty(ring.stage));
        if (i + 1 == count) { release_query(); }
        softmax(key_tile);
        // The exponentials are to be made under the product with V. The assembler would hoist the wait below over them to the top of its
        // basic block; the wait for V's copy, needed anyway, is a loop, and so a border that it does not cross.
        pin(s);
        barrier_wait(places.value_full(ring.stage), ring.parity);
        products_wait<0>();
        pin(o);
        release(places.value_empty(previous));
        convert();
      }
      pin(o);
      products_fence();
      issue_output(ring.stage);
      products_wait<0>();
      pin(o);
      release(places.value_empty(ring.stage));
      ring.advance();
    } else {
      release_query();
    }
    // --- what comes out ---
    const bool attended = tile.count[group] > 0;
    pass_over(uniform(tile.length - tile.skip[group] - tile.count[group]));
    const int flags = tile.flags;
    const bool live0 = row < tile.q_rows;
    const bool live1 = row + 8 < tile.q_rows;
    bool writes = true;
    if (mode == kCompute) {
      const bool over = (live0 && !within<Element>(l0)) || (live1 && !within<Element>(l1));
      writes = !attended || !__any_sync(~0U, over);
      if (!writes && lane == 0) {
        std::uint32_t* entry = args.redo + 2 * static_cast<std::int64_t>(slot.index);
        if (atomicOr(entry, 1U << warp) == 0U) { entry[1] = static_cast<std::uint32_t>(atomicExch(places.redo_head(), slot.index)); }
      }
    } else {
      writes = (static_cast<unsigned>(mode) >> warp & 1U) != 0;
    }
    const bool carries = writes && (flags & kLast) == 0 && group * kGroupRows < tile.q_rows && (attended || (flags & kFirst) != 0);
    float4* const partial = static_cast<float4*>(args.partial) + tile.partial + group * P::kPartialVectors + thread;
    store_if(partial + kHeadDim / 8 * 128, (unset & 1U) != 0 ? -INFINITY : b0, (unset & 2U) != 0 ? -INFINITY : b1, l0, l1, carries);
#pragma unroll
    for (int g = 0; g < kHeadDim / 8; ++g) { store_if(partial + g * 128, o[4 * g], o[4 * g + 1], o[4 * g + 2], o[4 * g + 3], carries); }
    if (writes && (flags & kLast) != 0) {
      l0 += __shfl_xor_sync(~0U, l0, 1), l1 += __shfl_xor_sync(~0U, l1, 1);
      l0 += __shfl_xor_sync(~0U, l0, 2), l1 += __shfl_xor_sync(~0U, l1, 2);
      float factor0 = 1.0F;
      float factor1 = 1.0F;
      if (tile.zero_keys > 0) {
        const auto zeros = static_cast<float>(tile.zero_keys);
        factor0 = add_zero_keys(b0, l0, zeros);
        factor1 = add_zero_keys(b1, l1, zeros);
      }
      // Read anew, and unsigned below: the assembler would keep both in registers through the loop, and head_dim 256 has none left.
      const int quad_again = lane_number() % 4;
      const std::int64_t below = static_cast<std::uint32_t>(row);
      constexpr float kLn2 = 0.6931471805599453F;
      if (quad_again == 0) {
        if (live0) { args.lse[tile.lse + below * tile.lse_pitch] = l0 == 0.0F ? -INFINITY : (b0 + log2f(l0)) * kLn2; }
        if (live1) { args.lse[tile.lse + (below + 8) * tile.lse_pitch] = l1 == 0.0F ? -INFINITY : (b1 + log2f(l1)) * kLn2; }
      }
      const float i0 = l0 == 0.0F ? 0.0F : factor0 / l0;
      const float i1 = l1 == 0.0F ? 0.0F : factor1 / l1;
      Element* const out0 = static_cast<Element*>(args.out) + tile.out + below * tile.out_pitch;
      Element* const out1 = out0 + 8 * tile.out_pitch;
      // Neighbouring lanes exchange a word, so that each stores 8 bytes and a quad a whole sector.
      const bool odd = (quad_again & 1) != 0;
      const int column = 4 * (quad_again >> 1) + (odd ? 8 : 0);
#pragma unroll
      for (int g = 0; g + 1 < kHeadDim / 8; g += 2) {
        const std::uint32_t a = pack_pair<Element>(o[4 * g] * i0, o[4 * g + 1] * i0);
        const std::uint32_t b = pack_pair<Element>(o[4 * g + 4] * i0, o[4 * g + 5] * i0);
        const std::uint32_t a8 = pack_pair<Element>(o[4 * g + 2] * i1, o[4 * g + 3] * i1);
        const std::uint32_t b8 = pack_pair<Element>(o[4 * g + 6] * i1, o[4 * g + 7] * i1);
        const std::uint32_t other = __shfl_xor_sync(~0U, odd ? a : b, 1);
        const std::uint32_t other8 = __shfl_xor_sync(~0U, odd ? a8 : b8, 1);
        if (8 * g + column + 4 <= args.head_dim) {
          if (live0) { *reinterpret_cast<uint2*>(out0 + 8 * g + column) = odd ? make_uint2(other, b) : make_uint2(a, other); }
          if (live1) { *reinterpret_cast<uint2*>(out1 + 8 * g + column) = odd ? make_uint2(other8, b8) : make_uint2(a8, other8); }
        }
      }
      if constexpr (kHeadDim / 8 % 2 != 0) {
        constexpr int g = kHeadDim / 8 - 1;
        if (8 * g < args.head_dim) {
          const std::uint32_t a = pack_pair<Element>(o[4 * g] * i0, o[4 * g + 1] * i0);
          const std::uint32_t a8 = pack_pair<Element>(o[4 * g + 2] * i1, o[4 * g + 3] * i1);
          if (live0) { *reinterpret_cast<std::uint32_t*>(out0 + 8 * g + 2 * quad_again) = a; }
          if (live1) { *reinterpret_cast<std::uint32_t*>(out1 + 8 * g + 2 * quad_again) = a8; }
        }
      }
    }
    __syncwarp();
    release(places.slot_empty(n));
  }
  if (thread == 0 && args.cycles != nullptr) { atomicMax(args.cycles, static_cast<unsigned long long>(clock64() - *places.start())); }
}

template <class Element, int kIndex>
__global__ void __launch_bounds__(Plan<kIndex>::kThreads, 1)
    attend_tiles(const __grid_constant__ TensorMaps maps, const __grid_constant__ Arguments args) {
  using P = Plan<kIndex>;
  extern __shared__ __align__(1024) std::uint8_t memory[];
  const Places<kIndex> places{memory, shared_address(memory)};
  const int group = uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) { places.initialise(); }
  __syncthreads();
  if (group == P::kGroups) {
    give_registers<P::kProducerRegisters>();
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32) - P::kWarps;
    if (warp == 1) {
      sweep<kIndex>(args, places);
    } else if (threadIdx.x == P::kGroups * 128) {
      Producer<kIndex> producer{maps, args, places};
      producer.run();
    }
  } else {
    take_registers<P::kConsumerRegisters>();
    consume<Element, kIndex>(args, places, group);
  }
}

}  // namespace annulus::kernels::cuda::fused
