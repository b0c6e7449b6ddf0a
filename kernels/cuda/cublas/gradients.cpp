// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/cublas.hpp>

#include "chains.hpp"
#include "check.hpp"
#include "gradient_scores.hpp"
#include "gradient_tiles.hpp"
#include "handles.hpp"
#include "lane.hpp"
#include "products.hpp"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <array>
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

GradientOperands operands_of(const GradientTask& task, const GradientTile& tile) {
  const AttendTask& at = task.attend;
  const std::int64_t element = size_of(at.dtype);
  const std::int64_t q = (tile.base.q + tile.q_begin * at.q_strides.row) * element;
  const std::int64_t kv = (tile.base.kv + tile.k_begin * at.kv_strides.row) * element;
  const auto moved = [](const void* tensor, std::int64_t bytes) { return static_cast<const std::byte*>(tensor) + bytes; };
  GradientOperands operands;
  operands.q = moved(at.q, q);
  operands.dout = moved(task.dout, q);
  operands.k = moved(at.k, kv);
  operands.v = moved(at.v, kv);
  operands.q_row_stride = at.q_strides.row;
  operands.q_instance_stride = tile.step.q;
  operands.kv_row_stride = at.kv_strides.row;
  operands.kv_instance_stride = tile.step.kv;
  operands.head_dim = to_int(at.head_dim);
  return operands;
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
      chains_[chain].push_back(tile);
    });
    run_chains(task, tiling, at_once, workspace, used);
    for (std::size_t i = 0; i < used; ++i) {
      ANNULUS_KERNELS_CHECK(cudaEventRecord(lanes_[i].event(), lanes_[i].stream()));
      ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(stream, lanes_[i].event(), 0));
    }
    ANNULUS_KERNELS_CHECK(cudaEventRecord(done_.get(), stream));
  }

 private:
  /// Enqueues all chains; the lane with least work takes the next tile, so that lanes fill together and end together.
  void run_chains(const GradientTask& task, const CublasTiling& tiling, bool at_once, std::byte* workspace, std::size_t used) {
    const std::int64_t lane_bytes = kLibraryWorkspaceBytes + gradient_scratch_bytes(tiling);
    struct Position {
      std::size_t chain = 0;
      std::size_t tile = 0;
      std::int64_t cost = 0;
      bool busy = false;
    };
    std::array<Position, kMostStreams> lanes{};
    std::size_t next = 0;
    for (;;) {
      std::size_t least = used;
      for (std::size_t i = 0; i < used; ++i) {
        if (!lanes[i].busy && next == chains_.size()) { continue; }
        if (least == used || lanes[i].cost < lanes[least].cost) { least = i; }
      }
      if (least == used) { return; }
      Position& at = lanes[least];
      if (!at.busy) { at = {next++, 0, at.cost, true}; }
      if (at.tile == chains_[at.chain].size()) {
        at.busy = false;
        continue;
      }
      const GradientTile& tile = chains_[at.chain][at.tile++];
      const std::int64_t lane = static_cast<std::int64_t>(least);
      std::byte* const memory = workspace + lane * lane_bytes + kLibraryWorkspaceBytes;
      enqueue(task, tile, at_once ? scratch_of_elements(tiling, tile, memory) : scratch_of_floats(tiling, tile, memory), at_once,
              lanes_[least]);
      at.cost += tile.instances * tile.rows * tile.cols;
    }
  }

  static void enqueue(const GradientTask& task, const GradientTile& tile, const GradientScratch& scratch, bool at_once, const Lane& lane) {
    const GradientScores scores = scores_of(task, tile, scratch);
    if (at_once) {
      gradient_probabilities(task.attend.dtype, operands_of(task, tile), scores, lane.stream());
    } else {
      for (const GradientProduct& product : score_products(task, tile, scratch)) { multiply(lane.handle(), task.attend.dtype, product); }
      differentiate_scores(task.attend.dtype, scores, lane.stream());
    }
    for (const GradientProduct& product : gradient_products(task, tile, scratch)) { multiply(lane.handle(), task.attend.dtype, product); }
  }

  std::vector<Lane> lanes_;
  std::vector<std::vector<GradientTile>> chains_;  ///< of the present call
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
