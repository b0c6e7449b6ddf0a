// SPDX-License-Identifier: Apache-2.0
// The independent checker of a multihead layer. It shares no code with the layer's kernels: rows are projected one by one from the
// definition, in fp64 and plainly in the problem's dtype.
#pragma once

#include <annulus/core/layer.hpp>
#include <annulus/io/layer_source.hpp>
#include <annulus/verify/compare.hpp>
#include <annulus/verify/oracle.hpp>

#include <atomic>
#include <cstdint>
#include <span>

namespace annulus {

/// A layer's chosen rows.
struct LayerOracleRows {
  OracleRows attention;  ///< O and LSE of the rows; the fp64 run takes Q, K and V in fp64
  /// y: out, plain_out and scaled_out, index [row][embed]. The plain run rounds Q, K, V, O, what norm and gate make of it, and y, once
  /// each; its sums go in fp32 from the first feature to the last.
  OracleRows output;
};

/// Computes the rows from the definition. Matrices are rounded to problem.dtype once, and x is; biases and norms stay fp32. Other arguments
/// and limits as oracle_rows(); every key that a checked row may see is projected, in fp64.
LayerOracleRows layer_oracle_rows(const LayerSource& source, const Layer& layer, const Problem& problem, const Pattern& pattern,
                                  std::span<const RowId> rows, PlainProbabilities probabilities, int threads,
                                  std::atomic<std::uint64_t>* progress = nullptr);

/// Compares rows of y, [row][embed] in problem.dtype, and of LSE, [row][head]. In `worst` and the like a row has one head, of embed
/// elements.
ErrorSums compare_layer_rows(const Layer& layer, const Problem& problem, std::span<const RowId> rows, const void* y, const float* lse,
                             const LayerOracleRows& oracle);

/// That the sums are of `rows` whole rows of y. @throws AssertionFailure with both numbers
void require_all_compared(const Layer& layer, std::int64_t rows, const ErrorSums& sums);

}  // namespace annulus
