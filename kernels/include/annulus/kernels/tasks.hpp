// SPDX-License-Identifier: Apache-2.0
// What a backend is asked to do, as plain data: pointers, extents and strides, nothing else. Strides count elements of the
// tensor they belong to. Every row set is a progression, so a dilated row is a row stride and never an index vector.
#pragma once

#include <annulus/kernels/dropout.hpp>
#include <annulus/kernels/dtype.hpp>

#include <array>
#include <cstdint>

namespace annulus::kernels {

/// Which keys a query of a task may see.
enum class Mask {
  none,    ///< all keys of the task
  causal,  ///< key k iff global position of k <= global position of q
};
inline constexpr std::array<Mask, 2> kMasks{Mask::none, Mask::causal};

/// How a row whose head has several branches, each with a partial of its own, combines them.
enum class Combine { lse, mean, sum };

/// Which of a task's keys a query row meets. Rows have a place in their segment, counted in the branch's own rows, and belong to blocks of
/// `block_rows` rows that are counted from the segment's start.
enum class KeyPart {
  all,    ///< down, then above
  down,   ///< those from the end of the row's own block down, the last first
  above,  ///< those above the row's own block, the last first
};

/// Where a task's rows stand in their segment, in rows of the branch.
struct SegmentPlace {
  /// Rows of a block; 0: rows have no place, and every row meets all keys in whatever order the kernel takes them.
  std::int64_t block_rows = 0;
  std::int64_t q_first = 0;  ///< place of query row 0; the others follow it one by one
  std::int64_t k_first = 0;  ///< place of key row 0; the others follow it one by one
  KeyPart part = KeyPart::all;
  bool operator==(const SegmentPlace&) const = default;
};

/// Global positions first + i*stride of a task's rows (segment 0; segment s adds s * segment_stride to both q and k).
struct Positions {
  std::int64_t first = 0;
  std::int64_t stride = 1;
  bool operator==(const Positions&) const = default;
};

/// Which numbers of the whole problem a task's rows and heads are, where probabilities are dropped. Row i of segment s is number
/// positions.first + i * positions.stride + (first_segment + s) * segment_step, of queries and of keys.
struct TaskDropout {
  Dropout dropout;              ///< first_batch is that of the task's entry 0
  std::int64_t first_head = 0;  ///< query head 0 of KV head 0; those of one KV head follow it one by one
  std::int64_t kv_head_step = 1;
  std::int64_t first_segment = 0;
  std::int64_t q_segment_step = 0;
  std::int64_t k_segment_step = 0;
  bool operator==(const TaskDropout&) const = default;
};

/// Strides of one operand over the five axes of a task, in elements; head_dim is contiguous.
struct TaskStrides {
  std::int64_t batch = 0;
  std::int64_t segment = 0;
  std::int64_t row = 0;
  std::int64_t kv_head = 0;  ///< from one KV head of the task to the next (for q, acc: to the next group of query heads)
  std::int64_t head = 0;     ///< between query heads of one KV head; unused for k and v
  bool operator==(const TaskStrides&) const = default;
};

/// Dense attention of q_rows x k_rows, for every (batch, segment, kv_head, head), folded into a running partial.
///
/// q [batch, segment, q_rows, kv_heads, q_per_kv, head_dim], k and v [batch, segment, k_rows, kv_heads, head_dim]; dtype as given.
/// The running partial of a row is un-normalised: `max` = largest score so far, `sum` = sum of exp(score - max),
/// `acc` = sum of exp(score - max) * v; empty is (max -inf, sum 0, acc 0). Scores are scale * <q, k>, natural exponent.
/// Where probabilities are dropped, `acc` alone takes them times their factors; not by the kernels of backend cuda.
/// Partials are fp32, or fp64 for the reference kernels. Extents are >= 1 (causal tasks may still hold fully masked rows).
/// Source of the update: Milakov & Gimelshein 2018, online softmax, algorithm 3.
struct AttendTask {
  DType dtype = DType::fp32;
  Mask mask = Mask::none;
  std::int64_t batch = 0;
  std::int64_t segments = 0;
  std::int64_t q_rows = 0;
  std::int64_t k_rows = 0;
  std::int64_t kv_heads = 0;
  std::int64_t q_per_kv = 0;
  std::int64_t head_dim = 0;
  double scale = 1.0;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* acc = nullptr;  ///< [.., head_dim] as q
  void* max = nullptr;  ///< one number for each row of q
  void* sum = nullptr;  ///< as max, same strides
  TaskStrides q_strides;
  TaskStrides kv_strides;  ///< k and v alike
  TaskStrides acc_strides;
  TaskStrides stat_strides;
  Positions q_positions;
  Positions k_positions;
  SegmentPlace place;  ///< read by kernels that keep an order of keys
  TaskDropout dropout;
  /// The same work on the same memory.
  bool operator==(const AttendTask&) const = default;
};

/// Lets rows of a running partial begin with `count` keys whose score is 0 and whose value is 0: max 0, and `count` more in sum. Nothing
/// but such keys may have been folded into the rows before. Shapes and strides are those of an AttendTask.
struct ZeroKeysTask {
  std::int64_t count = 0;
  std::int64_t batch = 0;
  std::int64_t segments = 0;
  std::int64_t rows = 0;
  std::int64_t kv_heads = 0;
  std::int64_t q_per_kv = 0;
  void* max = nullptr;
  void* sum = nullptr;
  TaskStrides strides;  ///< of max and sum
  bool operator==(const ZeroKeysTask&) const = default;
};

/// Gathers rows: dst [batch, rows, heads, head_dim] contiguous <- src with strides (elements). dst must not alias src.
struct PackTask {
  std::int64_t element_size = 0;
  std::int64_t batch = 0;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  const void* src = nullptr;
  void* dst = nullptr;
  std::int64_t src_batch_stride = 0;
  std::int64_t src_row_stride = 0;
  std::int64_t src_head_stride = 0;
};

/// A contiguous partial: acc [batch, rows, heads, head_dim], max and sum [batch, heads, rows]; fp32, or fp64 for reference.
struct PartialPointers {
  void* acc = nullptr;
  void* max = nullptr;
  void* sum = nullptr;
};

/// Largest number of partials that one FinishTask combines: of the branches of a pattern, and of keys that every row sees.
inline constexpr int kMaxPartials = 65;

/// Turns partials into the result: out [batch, rows, heads, head_dim] in `dtype`, lse [batch, heads, rows] fp32, both contiguous.
///
/// One partial: out = output_scale * acc / sum. Several: `mean` or `sum` of the normalised partials that cover the row. lse is always the
/// log-sum-exp over all partials: max + ln(sum). A row that nothing covers gets out 0 and lse -inf. Rounded once, to nearest even.
///
/// With a partial `extra` of keys that every row sees, `mean` and `sum` are of the other partials that cover the row, each with the extra
/// one folded into it before it is normalised: out = sum over g of (acc_g + acc_extra) / (sum_g + sum_extra), all at one maximum. A row
/// that no other partial covers has the extra one alone. In `lse`, and in lse, it counts once, like any other.
struct FinishTask {
  DType dtype = DType::fp32;
  Combine combine = Combine::lse;
  std::int64_t batch = 0;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  double output_scale = 1.0;
  int partials = 1;
  int extra = -1;  ///< number of the partial of keys that every row sees; -1: there is none
  PartialPointers partial[kMaxPartials];
  void* out = nullptr;
  float* lse = nullptr;
};

/// Makes of the running partials of a forward pass, once its FinishTask is done, what the backward pass takes of each row.
///
/// Of a row that sees keys, `max` becomes the number with which exp(score - max) is the key's probability times the factor of its softmax
/// in the output, and `sum` becomes <dO, O>, O being the softmax's own output; what they are of depends on `combine` as in FinishTask. Of a
/// row that sees none they become +inf and 0. `acc` of the first partial becomes the running dQ and is 0; the others' are done with.
struct BeginGradientsTask {
  FinishTask forward;          ///< out and lse are not touched
  const void* dout = nullptr;  ///< [batch, rows, heads, head_dim] in the task's dtype
};

/// What dense attention of q_rows x k_rows gives to the gradients, for every (batch, segment, kv_head, head). With P = exp(score - max) and
/// dS = scale P (<dO, v> - sum):
///   dQ += dS k,  dK += dS q,  dV += P dO;
/// where probabilities are dropped, with D their factors, dS = scale P (D <dO, v> - sum) and dV += D P dO.
/// `attend` names the same rows as in the forward pass, but that acc is the running dQ, that max and sum are read, as BeginGradientsTask
/// left them, and that no order of keys is kept. dK and dV are fp32 and lie as k and v do, by the same strides; they must not alias.
/// Source: Dao 2023, FlashAttention-2, algorithm 2.
struct GradientTask {
  AttendTask attend;
  const void* dout = nullptr;  ///< as q
  float* dk = nullptr;         ///< as k
  float* dv = nullptr;         ///< as v
  bool operator==(const GradientTask&) const = default;
};

/// Numbers that become 0.
struct ClearTask {
  float* data = nullptr;
  std::int64_t count = 0;
};

/// dst += src: src [batch, rows, heads, head_dim] contiguous, dst with strides (elements), both fp32. dst must not alias src.
struct AddTask {
  std::int64_t batch = 0;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  const float* src = nullptr;
  float* dst = nullptr;
  std::int64_t dst_batch_stride = 0;
  std::int64_t dst_row_stride = 0;
  std::int64_t dst_head_stride = 0;
};

/// dst [count] <- src [count], rounded once, to nearest even. dst must not alias src.
struct RoundTask {
  DType dtype = DType::fp32;  ///< of dst
  std::int64_t count = 0;
  std::int64_t source_bytes = 4;  ///< of a number of src: 4 (fp32) or 8 (fp64)
  const void* src = nullptr;
  void* dst = nullptr;
};

/// The draws of a query row of a task.
inline DropoutRow dropout_row(const AttendTask& task, std::int64_t batch, std::int64_t segment, std::int64_t kv_head, std::int64_t head,
                              std::int64_t q_row) {
  const TaskDropout& of = task.dropout;
  return {of.dropout, of.dropout.first_batch + batch, of.first_head + kv_head * of.kv_head_step + head,
          task.q_positions.first + q_row * task.q_positions.stride + (of.first_segment + segment) * of.q_segment_step};
}

/// The number of a task's key row in the whole problem.
inline std::int64_t dropout_key(const AttendTask& task, std::int64_t segment, std::int64_t k_row) {
  const TaskDropout& of = task.dropout;
  return task.k_positions.first + k_row * task.k_positions.stride + (of.first_segment + segment) * of.k_segment_step;
}

}  // namespace annulus::kernels
