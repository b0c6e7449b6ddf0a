// SPDX-License-Identifier: Apache-2.0
// The independent checker of gradients. Like the oracle of O it shares no index code with the path it checks, and it reads the source
// itself.
#pragma once

#include <annulus/core/problem.hpp>
#include <annulus/io/source.hpp>
#include <annulus/verify/oracle.hpp>

#include <atomic>
#include <cstdint>
#include <span>

namespace annulus {

/// One gradient of chosen rows in fp64, and by a plain run in the problem's dtype: same-dtype inputs, fp32 scores, probabilities and sums,
/// rounded once; where probabilities are rounded, they and dS are to the dtype before they are multiplied. Index [row][head of the
/// tensor][head_dim].
struct GradientOfRows {
  List<double> exact;
  List<float> plain;
};

/// What the loss changes by with Q, K and V of chosen rows, where it changes by dO with O.
struct GradientRows {
  GradientOfRows dq;
  GradientOfRows dk;
  GradientOfRows dv;
  double max_score = 0;      ///< largest |scale * <q, k>| met
  double query_squares = 0;  ///< sums of squares over the checked heads of the whole sequence, of the batch entries that hold a row
  double key_squares = 0;
  double value_squares = 0;
  double dout_squares = 0;
  std::int64_t query_count = 0;  ///< elements of Q and of dO in these sums
  std::int64_t key_count = 0;    ///< of K and of V
};

/// Differentiates the definition. With P the probabilities of a softmax, O = P V and c the factor of O in the output (1, divided by the
/// branches that cover the row under Mixing::mean and by the number of branches under scale_by_branches):
///   dV = P^T c dO,  dS = P (c dO V^T - c rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q.
/// Under Mixing::lse the branches' keys share one softmax, else each branch has its own. Keys of zeros take weight and have no gradient; a
/// row that sees no key has gradient 0.
///
/// `kv_heads` are the KV heads asked for, with all their query heads; the places of the others hold 0. Rows are those of the source, may
/// come in any order and repeat. Memory: Q, K, V and dO of those heads, twice, in fp32 and fp64. Costs the forward pass of every row that
/// shares a segment with one of `rows`.
/// Pure; adds to `progress`, unless it is null, while it works. A result does not depend on `threads`.
/// @throws InvalidArgument if the source has no dO, the extents are not the source's, a row or head lies outside, or problem or pattern is
/// not valid
GradientRows oracle_gradients(const TensorSource& source, const Problem& problem, const Pattern& pattern, std::span<const RowId> rows,
                              const CheckedHeads& kv_heads, PlainProbabilities probabilities, int threads,
                              std::atomic<std::uint64_t>* progress = nullptr);

}  // namespace annulus
