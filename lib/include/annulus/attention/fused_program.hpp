// SPDX-License-Identifier: Apache-2.0
// What kernel fused does for one plan: the records of each launch, and how partials become rows. Pure; it needs no device.
#pragma once

#include <annulus/attention/lower.hpp>
#include <annulus/kernels/fused.hpp>
#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <vector>

namespace annulus {

/// K, and V after it, as contiguous [batch, rows, heads, head_dim].
struct KeyTensor {
  BufferId buffer = BufferId::resident;
  std::int64_t offset_bytes = 0;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  bool operator==(const KeyTensor&) const = default;
};

struct FusedProgram {
  /// Records of one wave of a step: they touch different rows.
  struct Launch {
    std::int64_t step = 0;
    std::vector<kernels::cuda::fused::Record> records;
    std::int64_t tiles = 0;
  };
  std::vector<Launch> launches;  ///< in order
  std::vector<KeyTensor> keys;   ///< number n is operands 1 + 2n and 2 + 2n; operand 0 is Q. The first are the pieces of the shard
  std::int64_t partials = 0;     ///< of 64 rows, that are carried from launch to launch
  std::int64_t tiles = 0;        ///< of all launches
  std::int64_t most_tiles = 0;   ///< of one launch

  /// Whether each row has one branch at most, unscaled and without extra keys: its last record then writes O and LSE, and no partial is
  /// left.
  bool writes_rows = false;
  /// Where the partials of each query head lie, by the order of its branches, extra keys last; begin[head] is the first. Empty if rows are
  /// written. Rows that nothing covers are written from here, too, so there may be a begin without entries.
  std::vector<kernels::cuda::fused::CombineEntry> entries;
  std::vector<std::int32_t> begin;  ///< [heads + 1], or nothing where all rows are written
};

/// @param plan  of a head_dim and dtype that the kernel takes
FusedProgram fused_program(const RingPlan& plan);

/// The tensors of a program at their addresses.
std::vector<kernels::cuda::fused::Operand> fused_operands(const FusedProgram& program, const RingPlan& plan,
                                                          const TensorAddresses& addresses);

/// Bytes of device memory that it takes beside its tensors.
Int128 fused_bytes(const FusedProgram& program, std::int64_t head_dim);

}  // namespace annulus
