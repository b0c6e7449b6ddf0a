// SPDX-License-Identifier: Apache-2.0
#include "tensor_maps.hpp"

#include "check.hpp"

#include <cuda_runtime_api.h>

#include <array>
#include <stdexcept>
#include <string>

namespace annulus::kernels::cuda::fused {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, found at run time: nothing here links to libcuda.
Encode encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  ANNULUS_KERNELS_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || function == nullptr) { throw LibraryError("the driver has no cuTensorMapEncodeTiled"); }
  return reinterpret_cast<Encode>(function);
}

CUtensorMapDataType element_of(DType dtype) {
  switch (dtype) {
    case DType::fp16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::bf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::fp32:
      break;
  }
  throw std::invalid_argument("the fused kernel takes bf16 and fp16");
}

}  // namespace

CUtensorMap encode(const MapRequest& request, const Operand& operand, DType dtype, std::int64_t head_dim) {
  constexpr cuuint64_t kBytes = 2;
  const std::int64_t longer = operand.rows % request.rate;
  const std::int64_t residues = request.longer ? longer : request.rate - longer;
  const std::int64_t rows = operand.rows / request.rate + (request.longer ? 1 : 0);
  const auto* data = static_cast<const std::byte*>(operand.data) + (request.longer ? 0 : longer * operand.row_stride * 2);
  const auto size = [](std::int64_t value) { return static_cast<cuuint64_t>(value); };
  const std::array<cuuint64_t, 5> extents{size(head_dim), size(operand.heads), size(rows), size(residues), size(operand.batches)};
  const std::array<cuuint64_t, 4> strides{size(operand.head_stride) * kBytes, size(request.rate * operand.row_stride) * kBytes,
                                          size(operand.row_stride) * kBytes, size(operand.batch_stride) * kBytes};
  const std::array<cuuint32_t, 5> box{64, 1, static_cast<cuuint32_t>(request.box), 1, 1};
  const std::array<cuuint32_t, 5> steps{1, 1, 1, 1, 1};
  // Short rows of a dilated operand share a sector pair with rows that nobody asked for.
  const CUtensorMapL2promotion promotion =
      request.rate > 1 && head_dim < 64 ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  CUtensorMap map;
  static const Encode function = encode_function();
  const CUresult status =
      function(&map, element_of(dtype), 5, const_cast<std::byte*>(data), extents.data(), strides.data(), box.data(), steps.data(),
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw LibraryError("cuTensorMapEncodeTiled refused [" + std::to_string(operand.batches) + ", " + std::to_string(operand.rows) + ", " +
                       std::to_string(operand.heads) + ", " + std::to_string(head_dim) + "] at rate " + std::to_string(request.rate) +
                       ": error " + std::to_string(status));
  }
  return map;
}

}  // namespace annulus::kernels::cuda::fused
