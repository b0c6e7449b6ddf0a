// SPDX-License-Identifier: Apache-2.0
// Row-major matrices meet a column-major library: with everything transposed, a tile is
//   S^T [k_cols x q_rows] = scale * K^T' Q  and  acc^T [d x q_rows] += V^T P^T,
// where a row stride is a leading dimension. Query rows are cut into chains; the key tiles of a chain follow each other on one lane (a
// stream with its own handle and scores), chains on different lanes overlap: the products of one with the softmax of another.
#include <annulus/kernels/cublas.hpp>

#include "chains.hpp"
#include "check.hpp"
#include "extents.hpp"
#include "handles.hpp"
#include "lane.hpp"
#include "products.hpp"
#include "recordings.hpp"
#include "share_chains.hpp"
#include "tile.hpp"
#include "tiling.hpp"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace annulus::kernels::cuda {
namespace {

/// Enqueues the next tile of `chain` on `lane`. @returns its scores, as a measure of its cost
std::int64_t enqueue_tile(Chain& chain, const Lane& lane) {
  const AttendTask& task = *chain.task;
  const auto [q_begin, rows, k_begin, cols, masked] = take_tile(chain);
  if (rows == 0) { return 0; }

  const std::int64_t element_size = size_of(task.dtype);
  const std::int64_t ld = score_row_stride(cols);
  const std::int64_t instance_stride = rows * ld;
  const InstanceOffsets start = chain.base + InstanceOffsets{q_begin * task.q_strides.row, k_begin * task.kv_strides.row,
                                                             q_begin * task.acc_strides.row, q_begin * task.stat_strides.row};
  const auto* q = static_cast<const std::byte*>(task.q) + start.q * element_size;
  const auto* k = static_cast<const std::byte*>(task.k) + start.kv * element_size;
  const auto* v = static_cast<const std::byte*>(task.v) + start.kv * element_size;
  float* acc = static_cast<float*>(task.acc) + start.acc;
  float* scores = lane.scores();

  const Products products = products_of(task.dtype);
  const auto alpha = static_cast<float>(task.scale);
  const float one = 1.0F;
  const float zero = 0.0F;
  const int batches = to_int(chain.instances);
  // The stride of a single row means nothing to the caller but must satisfy the library.
  const auto leading = [&](std::int64_t stride, std::int64_t count) { return count > 1 ? stride : std::max(stride, task.head_dim); };
  // 64-bit sizes throughout: a leading dimension is dilation * heads * head_dim, and passes 2^31 on long sequences.
  const std::int64_t ld_k = leading(task.kv_strides.row, task.k_rows);
  const std::int64_t ld_q = leading(task.q_strides.row, task.q_rows);
  const std::int64_t ld_acc = leading(task.acc_strides.row, task.q_rows);
  const std::int64_t ld_probabilities = ld * 4 / element_size;
  const InstanceOffsets step = chain.map.axis[0].stride;

  if (chain.by_pointer) {
    fill_pointers({chain.map, batches, static_cast<int>(element_size), k, q, v, scores, acc, instance_stride, lane.pointers()},
                  lane.stream());
    ANNULUS_KERNELS_CHECK(cublasGemmBatchedEx_64(lane.handle(), CUBLAS_OP_T, CUBLAS_OP_N, cols, rows, task.head_dim, &alpha,
                                                 lane.pointers().k, products.element, ld_k, lane.pointers().q, products.element, ld_q,
                                                 &zero, lane.pointers().scores, CUDA_R_32F, ld, batches, products.compute,
                                                 CUBLAS_GEMM_DEFAULT));
  } else {
    ANNULUS_KERNELS_CHECK(cublasGemmStridedBatchedEx_64(lane.handle(), CUBLAS_OP_T, CUBLAS_OP_N, cols, rows, task.head_dim, &alpha, k,
                                                        products.element, ld_k, step.kv, q, products.element, ld_q, step.q, &zero, scores,
                                                        CUDA_R_32F, ld, instance_stride, batches, products.compute, CUBLAS_GEMM_DEFAULT));
  }

  SoftmaxTile tile;
  tile.scores = scores;
  tile.ld = ld;
  tile.instance_stride = instance_stride;
  tile.instances = batches;
  tile.rows = to_int(rows);
  tile.cols = to_int(cols);
  tile.head_dim = to_int(task.head_dim);
  tile.map = chain.map;
  tile.max = static_cast<float*>(task.max) + start.stat;
  tile.sum = static_cast<float*>(task.sum) + start.stat;
  tile.acc = acc;
  tile.stat_row_stride = task.stat_strides.row;
  tile.acc_row_stride = task.acc_strides.row;
  tile.acc_vectorised = task.head_dim % 4 == 0 && reinterpret_cast<std::uintptr_t>(task.acc) % 16 == 0 && task.acc_strides.batch % 4 == 0 &&
                        task.acc_strides.segment % 4 == 0 && task.acc_strides.row % 4 == 0 && task.acc_strides.kv_head % 4 == 0 &&
                        task.acc_strides.head % 4 == 0;
  if (masked) {
    tile.causal = true;
    tile.lead = (task.q_positions.first + q_begin * task.q_positions.stride) - (task.k_positions.first + k_begin * task.k_positions.stride);
    tile.q_stride = task.q_positions.stride;
    tile.k_stride = task.k_positions.stride;
  }
  softmax_tile(task.dtype, tile, lane.stream());

  if (chain.by_pointer) {
    ANNULUS_KERNELS_CHECK(cublasGemmBatchedEx_64(lane.handle(), CUBLAS_OP_N, CUBLAS_OP_N, task.head_dim, rows, cols, &one,
                                                 lane.pointers().v, products.element, ld_k,
                                                 const_cast<const void**>(lane.pointers().scores), products.element, ld_probabilities, &one,
                                                 lane.pointers().acc, CUDA_R_32F, ld_acc, batches, products.compute, CUBLAS_GEMM_DEFAULT));
  } else {
    ANNULUS_KERNELS_CHECK(cublasGemmStridedBatchedEx_64(lane.handle(), CUBLAS_OP_N, CUBLAS_OP_N, task.head_dim, rows, cols, &one, v,
                                                        products.element, ld_k, step.kv, scores, products.element, ld_probabilities,
                                                        instance_stride * 4 / element_size, &one, acc, CUDA_R_32F, ld_acc, step.acc,
                                                        batches, products.compute, CUBLAS_GEMM_DEFAULT));
  }
  return rows * cols * chain.instances;
}

}  // namespace

class CublasAttention::Implementation {
 public:
  explicit Implementation(Submission submission) : submission_(submission) {}
  Implementation(const Implementation&) = delete;
  Implementation& operator=(const Implementation&) = delete;
  ~Implementation() { static_cast<void>(cudaEventSynchronize(done_.get())); }

  void attend(std::span<const AttendTask> tasks, const CublasTiling& tiling, std::byte* workspace, cudaStream_t stream) {
    // Never within a capture: it may load code, and it hands workspace to the library.
    while (lanes_.size() < static_cast<std::size_t>(tiling.streams)) { lanes_.emplace_back(); }
    used_ = static_cast<std::size_t>(tiling.streams);
    const std::int64_t lane_bytes = lane_layout(tiling).bytes;
    for (std::size_t i = 0; i < used_; ++i) { lanes_[i].use_memory(workspace + static_cast<std::int64_t>(i) * lane_bytes, tiling); }
    // An earlier call on another stream may still use the workspace.
    ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(stream, done_.get(), 0));
    if (submission_ == Submission::eager) {
      enqueue(tasks, tiling, stream);
    } else {
      recordings_.submit(tasks, tiling, workspace, stream);
    }
    ANNULUS_KERNELS_CHECK(cudaEventRecord(done_.get(), stream));
  }

  void forget(const std::byte* workspace) {
    recordings_.forget(workspace);
    for (Lane& lane : lanes_) { lane.forget_memory(); }
  }

  std::int64_t recordings() const { return recordings_.count(); }
  std::int64_t graph_launches() const { return recordings_.graph_launches(); }

 private:
  /// Enqueues all tasks on the lanes, forked from `stream` and joined to it. @returns the number of tiles
  std::int64_t enqueue(std::span<const AttendTask> tasks, const CublasTiling& tiling, cudaStream_t stream) {
    tiles_ = 0;
    ANNULUS_KERNELS_CHECK(cudaEventRecord(start_.get(), stream));
    for (std::size_t i = 0; i < used_; ++i) { ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(lanes_[i].stream(), start_.get(), 0)); }

    std::size_t phase_begin = 0;
    chains_.clear();
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      const auto clear_of = [&](const AttendTask& earlier) { return disjoint(earlier, tasks[i]); };
      if (!std::all_of(tasks.begin() + static_cast<std::ptrdiff_t>(phase_begin), tasks.begin() + static_cast<std::ptrdiff_t>(i),
                       clear_of)) {
        run_chains();
        wait_for_each_other();
        chains_.clear();
        phase_begin = i;
      }
      append_chains(tasks[i], tiling, chains_);
    }
    run_chains();
    for (std::size_t i = 0; i < used_; ++i) {
      ANNULUS_KERNELS_CHECK(cudaEventRecord(lanes_[i].event(), lanes_[i].stream()));
      ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(stream, lanes_[i].event(), 0));
    }
    return tiles_;
  }

  void run_chains() {
    share_chains(
        chains_, used_, [](const Chain& chain) { return chain.k_next < chain.k_end; },
        [&](Chain& chain, std::size_t lane) {
          const std::int64_t scores = enqueue_tile(chain, lanes_[lane]);
          if (scores > 0) { ++tiles_; }
          return scores;
        });
  }

  /// What lanes do from now on starts after what all of them have been given.
  void wait_for_each_other() {
    for (std::size_t i = 0; i < used_; ++i) { ANNULUS_KERNELS_CHECK(cudaEventRecord(lanes_[i].event(), lanes_[i].stream())); }
    for (std::size_t i = 0; i < used_; ++i) {
      for (std::size_t j = 0; j < used_; ++j) {
        if (i != j) { ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(lanes_[i].stream(), lanes_[j].event(), 0)); }
      }
    }
  }

  Submission submission_;
  std::vector<Lane> lanes_;
  std::size_t used_ = 0;  ///< lanes of the present call
  std::vector<Chain> chains_;
  std::int64_t tiles_ = 0;  ///< enqueued by the present call
  Owned<cudaEvent_t> start_ = make_event();
  Owned<cudaEvent_t> done_ = make_event();  ///< the end of the latest call
  Recordings recordings_{[this](auto... list) { return enqueue(list...); }, done_.get()};
};

CublasAttention::CublasAttention(Submission submission) : implementation_(std::make_unique<Implementation>(submission)) {}
CublasAttention::CublasAttention(CublasAttention&&) noexcept = default;
CublasAttention& CublasAttention::operator=(CublasAttention&&) noexcept = default;
CublasAttention::~CublasAttention() {
  // Destroying a cuBLAS handle waits for the device too.
  if (std::uncaught_exceptions() > exceptions_at_start_) { [[maybe_unused]] const Implementation* left = implementation_.release(); }
}

void CublasAttention::attend(std::span<const AttendTask> tasks, const CublasTiling& tiling, void* workspace, std::int64_t bytes,
                             CUstream_st* stream) {
  validate(tiling);
  for (const AttendTask& task : tasks) { validate(task); }
  require(bytes >= workspace_bytes(tiling), "CublasAttention: the workspace is too small for the tiling");
  if (tasks.empty()) { return; }
  implementation_->attend(tasks, tiling, static_cast<std::byte*>(workspace), stream);
}

void CublasAttention::forget(const void* workspace) { implementation_->forget(static_cast<const std::byte*>(workspace)); }

std::int64_t CublasAttention::recordings() const { return implementation_->recordings(); }

std::int64_t CublasAttention::graph_launches() const { return implementation_->graph_launches(); }

}  // namespace annulus::kernels::cuda
