// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/cublas.hpp>

#include "chains.hpp"
#include "check.hpp"
#include "gradient_scores.hpp"
#include "gradient_tiles.hpp"
#include "handles.hpp"
#include "lane.hpp"
#include "products.hpp"
#include "share_chains.hpp"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

namespace annulus::kernels::cuda {
namespace {

void multiply(cublasHandle_t handle, DType dtype, const GradientProduct& product) {
  const Products products = products_of(dtype);
  const auto operation = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  ANNULUS_KERNELS_CHECK(cublasGemmStridedBatchedEx_64(
      handle, operation(product.a_transposed), operation(product.b_transposed), product.m, product.n, product.k, &product.alpha, product.a,
      products.element, product.lda, product.stride_a, product.b, products.element, product.ldb, product.stride_b, &product.beta, product.c,
      CUDA_R_32F, product.ldc, product.stride_c, product.batches, products.compute, CUBLAS_GEMM_DEFAULT));
}

GradientScores scores_of(const GradientTask& task, const GradientTile& tile, const GradientScratch& scratch) {
  const AttendTask& at = task.attend;
  const std::int64_t stat = tile.base.stat + tile.q_begin * at.stat_strides.row;
  GradientScores scores;
  scores.scores = scratch.scores;
  scores.products = scratch.products;
  scores.ld = scratch.ld;
  scores.instance_stride = scratch.instance_stride;
  scores.instances = to_int(tile.instances);
  scores.rows = to_int(tile.rows);
  scores.cols = to_int(tile.cols);
  scores.max = static_cast<const float*>(at.max) + stat;
  scores.sum = static_cast<const float*>(at.sum) + stat;
  scores.stat_row_stride = at.stat_strides.row;
  scores.stat_instance_stride = tile.step.stat;
  scores.scale = static_cast<float>(at.scale);
  scores.causal = tile.masked;
  scores.lead = at.q_positions.first + tile.q_begin * at.q_positions.stride - at.k_positions.first - tile.k_begin * at.k_positions.stride;
  scores.q_stride = at.q_positions.stride;
  scores.k_stride = at.k_positions.stride;
  return scores;
}

}  // namespace

class CublasGradients::Implementation {
 public:
  Implementation() = default;
  Implementation(const Implementation&) = delete;
  Implementation& operator=(const Implementation&) = delete;
  ~Implementation() { static_cast<void>(cudaEventSynchronize(done_.get())); }

  void differentiate(const GradientTask& task, const CublasTiling& tiling, std::byte* workspace, cudaStream_t stream) {
    const auto used = static_cast<std::size_t>(tiling.streams);
    while (lanes_.size() < used) { lanes_.emplace_back(); }
    // An earlier call on another stream may still use the workspace.
    ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(stream, done_.get(), 0));
    ANNULUS_KERNELS_CHECK(cudaEventRecord(start_.get(), stream));
    const bool at_once = made_at_once(task) && device_makes_at_once(task.attend.head_dim);
    const CublasTiling tiles = at_once ? tiling : tiling_of_floats(tiling);
    const std::int64_t lane_bytes = kLibraryWorkspaceBytes + gradient_scratch_bytes(tiling);
    for (std::size_t i = 0; i < used; ++i) {
      ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(lanes_[i].stream(), start_.get(), 0));
      lanes_[i].use_library_workspace(workspace + static_cast<std::int64_t>(i) * lane_bytes);
    }
    chains_.clear();
    for_each_gradient_tile(task.attend, tiles, [&](const GradientTile& tile) {
      const auto chain = static_cast<std::size_t>(tile.chain);
      if (chains_.size() <= chain) { chains_.resize(chain + 1); }
      chains_[chain].tiles.push_back(tile);
    });
    share_chains(
        chains_, used, [](const Chain& chain) { return chain.next < chain.tiles.size(); },
        [&](Chain& chain, std::size_t lane) {
          const GradientTile& tile = chain.tiles[chain.next++];
          std::byte* const memory = workspace + static_cast<std::int64_t>(lane) * lane_bytes + kLibraryWorkspaceBytes;
          const GradientScratch scratch = at_once ? scratch_of_elements(tiling, tile, memory) : scratch_of_floats(tiling, tile, memory);
          enqueue(task, tile, scratch, at_once, lanes_[lane]);
          return tile.instances * tile.rows * tile.cols;
        });
    for (std::size_t i = 0; i < used; ++i) {
      ANNULUS_KERNELS_CHECK(cudaEventRecord(lanes_[i].event(), lanes_[i].stream()));
      ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(stream, lanes_[i].event(), 0));
    }
    ANNULUS_KERNELS_CHECK(cudaEventRecord(done_.get(), stream));
  }

 private:
  /// Tiles of which one follows the other.
  struct Chain {
    std::vector<GradientTile> tiles;
    std::size_t next = 0;  ///< to be enqueued
  };

  static void enqueue(const GradientTask& task, const GradientTile& tile, const GradientScratch& scratch, bool at_once, const Lane& lane) {
    const GradientScores scores = scores_of(task, tile, scratch);
    if (at_once) {
      gradient_probabilities(task.attend.dtype, gradient_operands(task, tile), scores, lane.stream());
    } else {
      for (const GradientProduct& product : score_products(task, tile, scratch)) { multiply(lane.handle(), task.attend.dtype, product); }
      differentiate_scores(task.attend.dtype, scores, lane.stream());
    }
    for (const GradientProduct& product : gradient_products(task, tile, scratch)) { multiply(lane.handle(), task.attend.dtype, product); }
  }

  std::vector<Lane> lanes_;
  std::vector<Chain> chains_;  ///< of the present call
  Owned<cudaEvent_t> start_ = make_event();
  Owned<cudaEvent_t> done_ = make_event();  ///< the end of the latest call
};

CublasGradients::CublasGradients() : implementation_(std::make_unique<Implementation>()) {}

CublasGradients::~CublasGradients() {
  // Destroying a cuBLAS handle waits for the device, whose peers may be gone.
  if (std::uncaught_exceptions() > exceptions_at_start_) { [[maybe_unused]] const Implementation* left = implementation_.release(); }
}

std::int64_t CublasGradients::workspace_bytes(const CublasTiling& tiling) {
  return tiling.streams * (kLibraryWorkspaceBytes + gradient_scratch_bytes(tiling));
}

void CublasGradients::differentiate(const GradientTask& task, const CublasTiling& tiling, void* workspace, std::int64_t bytes,
                                    CUstream_st* stream) {
  validate(tiling);
  validate(task.attend);
  require(bytes >= workspace_bytes(tiling), "CublasGradients: the workspace is too small for the tiling");
  implementation_->differentiate(task, tiling, static_cast<std::byte*>(workspace), stream);
}

}  // namespace annulus::kernels::cuda
