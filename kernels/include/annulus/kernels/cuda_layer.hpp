// SPDX-License-Identifier: Apache-2.0
// The operations of a multihead layer on GPUs. Everything is enqueued and in flight at return; memory handed over stays in use until the
// stream has passed it. All memory is device memory of the current device, on which the stream was made.
#pragma once

#include <annulus/kernels/layer.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>

struct CUstream_st;

namespace annulus::kernels::cuda {

/// Products with weights by cuBLAS. One stream for its life.
class WeightProducts {
 public:
  /// What cuBLAS asks for on Hopper; with less it would take memory by itself.
  static constexpr std::int64_t kWorkspaceBytes = std::int64_t{32} << 20;

  /// @param workspace kWorkspaceBytes bytes of device memory, 256-byte aligned, that outlive this. @throws LibraryError if cuBLAS does not
  /// start
  WeightProducts(void* workspace, CUstream_st* stream);
  ~WeightProducts();
  WeightProducts(const WeightProducts&) = delete;
  WeightProducts& operator=(const WeightProducts&) = delete;

  /// As LinearTask says: 16-bit operands on tensor cores, fp32 in fp32, sums in fp32.
  /// @throws LibraryError if the launch fails, std::invalid_argument if an extent does not fit an int
  void run(const LinearTask& task);

 private:
  struct Implementation;
  std::unique_ptr<Implementation> implementation_;
};

/// As TransformTask says, in fp32 with angles in fp64.
/// @throws LibraryError if the launch fails
void transform_rows(const TransformTask& task, CUstream_st* stream);

}  // namespace annulus::kernels::cuda
