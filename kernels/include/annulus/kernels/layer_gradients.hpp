// SPDX-License-Identifier: Apache-2.0
// The backward of the operations of layer.hpp. Gradients of rows are fp32; those of weights, biases and norms are sums over rows in fp64,
// to which a call adds its own rows, so that any number of calls makes one sum.
#pragma once

#include <annulus/kernels/layer.hpp>

#include <cstdint>

namespace annulus::kernels {

/// Of LinearTask: din += dout W^T, dweight += in^T dout. What is null is not computed.
struct LinearGradientTask {
  DType dtype = DType::fp32;  ///< of in and weight
  std::int64_t rows = 0;
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;
  const void* in = nullptr;      ///< [rows, in_features], the forward's
  const void* weight = nullptr;  ///< [in_features, out_features], the forward's
  const float* dout = nullptr;   ///< [rows, out_features], contiguous
  float* din = nullptr;          ///< [rows, in_features], added to: x has a gradient of each product that takes it; must not alias dout
  double* dweight = nullptr;     ///< [in_features, out_features], added to
};

/// Of TransformTask, whose `in` and `gate_in` are read again and whose `out` is not: statistics of norms and gates are computed anew.
/// What is null is not computed.
struct TransformGradientTask {
  TransformTask forward;
  const float* dout = nullptr;     ///< [rows, features], contiguous
  float* din = nullptr;            ///< [rows, features]; may be dout
  float* dgate_in = nullptr;       ///< [rows, features]; null where there is no gate; must not alias dout
  double* dbias = nullptr;         ///< [features], added to
  double* dnorm_weight = nullptr;  ///< [norm_features], added to
  double* dnorm_bias = nullptr;    ///< [norm_features], added to
  double* dgate_bias = nullptr;    ///< [features], added to
};

namespace cpu {

/// Bytes of workspace that linear_gradient() needs: both operands transposed, a product's result, and linear()'s own.
std::int64_t linear_gradient_workspace_bytes(const LinearGradientTask& task, int threads);

/// As LinearGradientTask says, by linear(): products and sums over the call's rows in fp32. The bits do not depend on `threads`.
/// workspace: at least linear_gradient_workspace_bytes(task, threads) bytes, 64-byte aligned; nothing is in flight at return.
/// @throws std::runtime_error as linear()
void linear_gradient(const LinearGradientTask& task, int threads, void* workspace);

/// As TransformGradientTask says: rows in fp32, means, angles and sums over rows in fp64. The bits do not depend on `threads`.
void transform_rows_gradient(const TransformGradientTask& task, int threads);

}  // namespace cpu

namespace reference {

/// As LinearGradientTask says, in fp64; din is rounded once a call.
void linear_gradient(const LinearGradientTask& task);

/// As TransformGradientTask says, in fp64.
void transform_rows_gradient(const TransformGradientTask& task);

}  // namespace reference
}  // namespace annulus::kernels
