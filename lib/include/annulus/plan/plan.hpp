// SPDX-License-Identifier: Apache-2.0
// The plan of one rank: a program, as plain data. Its ops say in which order it packs, posts, waits, attends and finishes; its steps say
// what. Made without MPI, GPU or memory of the problem's size; the executor, the reports, `annulus plan` and the proof in coverage.hpp
// interpret the same list of ops.
#pragma once

#include <annulus/core/problem.hpp>
#include <annulus/kernels/tasks.hpp>
#include <annulus/pattern/branch_rows.hpp>
#include <annulus/pattern/partition.hpp>
#include <annulus/pattern/rows.hpp>

#include <array>
#include <cstdint>
#include <vector>

namespace annulus {

/// Memory a plan speaks of.
enum class BufferId {
  resident,  ///< the rank's own K and V, piece after piece of its shard: [2, batch, rows of the piece, kv_heads, head_dim]
  slot_0,    ///< received blocks; as many slots as are in use at once
  slot_1,
  slot_2,
  slot_3,
  send_0,  ///< packed blocks sent for even steps
  send_1,
  extra,         ///< on rank 0 the extra keys and their values: [2, batch, extra_keys, kv_heads, head_dim]
  own_gradient,  ///< running dK and dV of the rank's own keys, fp32, laid out as resident
};
inline constexpr std::array<BufferId, 4> kSlots{BufferId::slot_0, BufferId::slot_1, BufferId::slot_2, BufferId::slot_3};
inline constexpr std::array<BufferId, 2> kSendBuffers{BufferId::send_0, BufferId::send_1};

/// The rows of one branch, one head class and one segment that one rank owns (or, for ring-full, a rank's undilated rows of all KV heads;
/// or the problem's extra keys of all KV heads, which are rank 0's and come after the sequence's rows).
/// In a buffer it lies as [2 (K, V), batch, rows, kv heads, head_dim], contiguous.
struct KvBlock {
  std::int64_t branch = -1;  ///< -1: undilated rows, or extra keys, of all KV heads
  std::int64_t head_class = -1;
  std::int64_t segment = -1;
  std::int64_t owner = 0;  ///< the rank whose rows they are
  Rows<Global> rows_global;
  Progression kv_heads;
  std::int64_t bytes = 0;
  bool operator==(const KvBlock&) const = default;
};

/// A block at its place in a buffer.
struct BlockPlace {
  std::int64_t block = 0;  ///< index into RingPlan::blocks
  BufferId buffer = BufferId::resident;
  std::int64_t offset_bytes = 0;
  bool operator==(const BlockPlace&) const = default;
};

/// All that travels between this rank and `peer` in one step: one contiguous range of one buffer.
struct Message {
  std::int64_t peer = 0;
  BufferId buffer = BufferId::resident;
  std::int64_t offset_bytes = 0;
  std::int64_t bytes = 0;
  std::vector<std::int64_t> blocks;     ///< in their order in memory; sender and receiver list the same rows
  std::vector<std::int64_t> gradients;  ///< blocks of which dK and dV follow, fp32, laid out as the block
  bool operator==(const Message&) const = default;
};

/// A block copied into a send buffer before its message: gathered from the resident rows, or moved out of a slot.
struct PackItem {
  std::int64_t block = 0;
  BufferId from = BufferId::resident;
  std::int64_t from_offset_bytes = 0;  ///< in a slot; unused for resident
  Rows<Local> from_rows;               ///< of one piece of the shard; empty where a whole block is moved out of a slot
  BufferId to = BufferId::send_0;
  std::int64_t to_offset_bytes = 0;
  bool operator==(const PackItem&) const = default;
};

/// What came of the dK and dV of a block, and what it is added to: what this rank gave to them, which then goes on, or at home the rows'
/// own.
struct SumItem {
  std::int64_t block = 0;
  BufferId from = BufferId::slot_0;
  std::int64_t from_offset_bytes = 0;
  BufferId to = BufferId::own_gradient;
  std::int64_t to_offset_bytes = 0;  ///< in a send buffer; unused for own_gradient
  Rows<Local> to_rows;               ///< of one piece of the shard; empty where a whole block is added to
  bool operator==(const SumItem&) const = default;
};

/// Where the keys of a work item lie, or their dK and dV.
struct KeyPlace {
  std::int64_t block = -1;  ///< -1: the rank's resident rows
  BufferId buffer = BufferId::resident;
  std::int64_t offset_bytes = 0;  ///< of the block, or of the piece of the shard, in its buffer
  bool operator==(const KeyPlace&) const = default;
};

/// Attention of some query rows to some key rows of one branch, the same for `segments` segments that lie segment_stride tokens apart
/// (in global and in local numbering; keys are resident when segments > 1). Each of its row sets is one run. Its branch is one past the
/// last where its keys are the extra ones: they have no segment, and no place in it. Any kernel can take a flat list of these. An item is
/// of all batch entries; item_parts.hpp says which of its keys Problem::kv_lengths leaves to each of them.
struct WorkItem {
  std::int64_t branch = 0;
  std::int64_t head_class = 0;
  std::int64_t segment = 0;  ///< the first one
  std::int64_t segments = 1;
  std::int64_t segment_stride = 0;
  HeadSet heads;
  Rows<Global> q_global;
  Rows<Local> q_local;
  Rows<Global> k_global;
  Rows<Local> k_local;    ///< of resident keys; empty if they are a block's
  Rows<Packed> k_packed;  ///< of keys in a block; empty if they are resident
  KeyPlace keys;
  KeyPlace gradient;  ///< of a step of the backward pass: the running dK and dV of the keys
  kernels::Mask mask = kernels::Mask::none;
  kernels::SegmentPlace place;
  std::int64_t zero_keys = 0;  ///< keys of zeros that its query rows see besides; said by the item in which a row meets itself, once
  std::int64_t partial = 0;    ///< number of the running partial that it folds into
  /// Items of one step and wave touch disjoint rows of the partials, in the backward pass of dQ and of dK and dV; waves run in ascending
  /// order.
  std::int64_t wave = 0;
  bool operator==(const WorkItem&) const = default;
};

/// What one step moves, and attends or differentiates. When, is said by the ops.
struct Step {
  std::vector<PackItem> packs;
  std::vector<Message> sends;
  std::vector<Message> receives;
  std::vector<WorkItem> work;  ///< by wave, ascending
  /// Of the backward pass: where the work leaves what this rank gives to dK and dV of the blocks that it meets. 0 before it.
  std::vector<BlockPlace> contributions;
  std::vector<SumItem> sums;  ///< of dK and dV that the step's messages brought, in this order
  bool operator==(const Step&) const = default;
};

enum class OpKind {
  pack,              ///< copies the step's blocks into the send buffer
  post,              ///< starts the step's messages
  wait,              ///< what comes after it sees what the step's messages brought
  attend,            ///< the step's work, wave after wave
  finish,            ///< combines the partials into O and LSE; with gradients to follow, makes of the partials what they are made from
  accumulate,        ///< adds what the step's messages brought of dK and dV
  differentiate,     ///< what the step's work gives to dQ, dK and dV
  finish_gradients,  ///< rounds the running dQ, dK and dV
};

/// One instruction of a plan. Ranks that share a process run the ops of one turn rank after rank before any of the next turn, so that
/// all have posted before one waits.
struct Op {
  OpKind kind = OpKind::finish;
  std::int64_t step = 0;  ///< unused by finish and finish_gradients
  std::int64_t turn = 0;  ///< ascending in a plan
  bool operator==(const Op&) const = default;
};

/// How blocks travel, and in which order query rows meet their keys.
struct Routing {
  Schedule schedule = Schedule::ring;
  KeyOrder key_order = KeyOrder::arrival;  ///< cyclic or arrival
  std::int64_t block_rows = 0;             ///< the kernel's block, for KeyOrder::cyclic
  TileOrder tile_order = TileOrder::linear;
  bool gradients = false;  ///< whether the backward pass follows the forward one
  bool operator==(const Routing&) const = default;
};

/// Bytes that the plan says one rank will allocate, by use. The kernel adds its workspace.
struct MemoryPlan {
  std::int64_t inputs = 0;     ///< Q, K, V
  std::int64_t outputs = 0;    ///< O, LSE
  std::int64_t partials = 0;   ///< acc, max, sum
  std::int64_t slots = 0;      ///< receive slots and send buffers
  std::int64_t gradients = 0;  ///< dO, the running dK and dV in fp32, dQ, dK and dV; the running dQ is where a partial was
  std::int64_t total() const { return inputs + outputs + partials + slots + gradients; }
};

/// What decides how much memory a plan needs.
struct PlanSizes {
  std::int64_t rank = 0;
  std::int64_t local_rows = 0;
  std::int64_t partials = 1;  ///< running partials of each row: one for all branches, or one for each, and maybe one for extra keys
  std::array<std::int64_t, kSlots.size()> slot_bytes{};
  std::array<std::int64_t, kSendBuffers.size()> send_bytes{};
  bool gradients = false;
  bool operator==(const PlanSizes&) const = default;
};

struct RingPlan {
  Problem problem;
  Pattern pattern;
  std::int64_t rank = 0;
  std::int64_t ranks = 1;
  Routing routing;
  Shard shard;
  std::int64_t local_rows = 0;
  List<KvBlock> blocks;
  List<Step> steps;                 ///< step 0 attends resident keys; at least one step
  std::int64_t forward_steps = 1;   ///< those after them are of the backward pass, and the first of these is of resident keys
  std::vector<Op> ops;              ///< in the order in which they run
  std::int64_t partials = 1;        ///< running partials of each row: one for all branches, or one for each, and maybe one for extra keys
  std::int64_t extra_partial = -1;  ///< that of extra keys alone; -1: there are none, or they share that of all branches
  std::array<std::int64_t, kSlots.size()> slot_bytes{};
  std::array<std::int64_t, kSendBuffers.size()> send_bytes{};
  bool operator==(const RingPlan&) const = default;
};

/// How many steps before its own work a step's messages are posted: 1 where what is sent came the step before, 2 where owners send what
/// they have had from the start.
std::int64_t steps_ahead(Schedule schedule);

/// Whether rows can meet their keys in the order of one rank under a partition and a schedule.
bool keeps_key_order(PartitionKind partition, Schedule schedule, bool causal);

/// The plan of `rank`. Pure: equal arguments give equal plans, and the plans of all ranks fit together.
///
/// KeyOrder::arrival attends resident keys first and then blocks as they come, with one partial for the branches of a head under
/// Mixing::lse. KeyOrder::cyclic lets every row meet its keys in the order of one rank: what lies above the own block of resident keys is
/// attended after the last block of the segment, and each branch has its own partial.
///
/// Extra keys are on all ranks that have queries by step 1, which attend them there and then; on rank 0, in step 0. They have a partial of
/// their own, which is the last to be combined, unless nothing but rounding is at stake: under KeyOrder::arrival, where one partial serves
/// all of a row's branches, they fold into that.
///
/// TileOrder::hilbert cuts the attention of a run of queries to a run of keys into tiles, at most 8 along either, which are visited along a
/// Hilbert curve, and neighbours on it that have no query row in common together. It keeps no order of keys.
///
/// With gradients, blocks travel a second time, by the same hops, one step of messages ahead of the work. What a rank gives to dK and dV of
/// a block lies in the send buffer from the step that meets the block on; two steps later it goes where the block went, added to what came
/// from the rank that had the block before, or home after the last one. (In the step between, that comes.) All ranks begin at the same
/// step.
/// @throws InvalidArgument if problem, pattern, partition and routing do not agree
RingPlan make_plan(const Problem& problem, const Pattern& pattern, const Partition& partition, const Routing& routing, std::int64_t rank);

/// Bytes of K and V of so many rows with so many KV heads, all batch entries.
std::int64_t block_bytes(const Problem& problem, std::int64_t rows, std::int64_t kv_heads);

/// Bytes that a rank keeps of the extra keys and their values: all of them on rank 0.
std::int64_t extra_bytes(const Problem& problem, std::int64_t rank);

/// Bytes of dK and dV of what has so many bytes of K and V.
std::int64_t gradient_bytes(const Problem& problem, std::int64_t kv_bytes);

/// Bytes of the resident K and V of so many rows.
std::int64_t resident_bytes(const Problem& problem, std::int64_t local_rows);

/// Where a piece of the shard begins in BufferId::resident, in bytes.
std::int64_t resident_offset(const Problem& problem, const ShardPiece& piece);

/// Bytes per buffer of a plan.
std::int64_t buffer_bytes(const RingPlan& plan, BufferId buffer);

}  // namespace annulus
