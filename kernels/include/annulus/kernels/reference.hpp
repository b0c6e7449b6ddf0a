// SPDX-License-Identifier: Apache-2.0
// The operations in fp64 and plain loops: what every other backend is compared with. Small enough to check by hand.
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <atomic>
#include <cstdint>

namespace annulus::kernels::reference {

/// Rows of a block of SegmentPlace.
inline constexpr std::int64_t kBlockRows = 256;

/// Sets a partial to the identity: acc [rows, head_dim] 0, max [rows] -inf, sum [rows] 0; fp64.
void fill_identity(const PartialPointers& partial, std::int64_t rows, std::int64_t head_dim);

/// As ZeroKeysTask says, fp64.
void add_zero_keys(const ZeroKeysTask& task);

/// Gathers rows as PackTask says; any element type, bits unchanged.
void pack(const PackTask& task);

/// Folds dense attention into a running fp64 partial as AttendTask says; q, k, v in task.dtype.
///
/// A row that sees no key is left untouched. A score of -inf contributes nothing; NaN and +inf make the row NaN.
/// acc, max and sum must not alias q, k or v. Adds to `progress`, unless it is null, after every row.
/// Source: Milakov & Gimelshein 2018, online softmax, algorithm 3.
void attend(const AttendTask& task, std::atomic<std::uint64_t>* progress = nullptr);

/// As BeginGradientsTask says, fp64.
void begin_gradients(const BeginGradientsTask& task);

/// As GradientTask says: dQ fp64; what the task gives to an element of dK or dV is summed in fp64 and added in fp32 once.
/// Adds to `progress`, unless it is null, after every key row.
void differentiate(const GradientTask& task, std::atomic<std::uint64_t>* progress = nullptr);

/// As ClearTask, AddTask and RoundTask say.
void clear(const ClearTask& task);
void add(const AddTask& task);
void round(const RoundTask& task);

/// Turns fp64 partials into out (task.dtype, rounded once to nearest even) and lse (fp32) as FinishTask says.
void finish(const FinishTask& task);

}  // namespace annulus::kernels::reference
