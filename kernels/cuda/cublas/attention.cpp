// SPDX-License-Identifier: Apache-2.0
// Row-major matrices meet a column-major library: with everything transposed, a tile is
//   S^T [k_cols x q_rows] = scale * K^T' Q  and  acc^T [d x q_rows] += V^T P^T,
// where a row stride is a leading dimension. Query rows are cut into chains; the key tiles of a chain follow each other on one lane (a
// stream with its own handle and scores), chains on different lanes overlap: the products of one with the softmax of another.
#include <annulus/kernels/cuda.hpp>
#include <annulus/kernels/visible_keys.hpp>

#include "check.hpp"
#include "tile.hpp"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace annulus::kernels::cuda {
namespace {

constexpr std::int64_t kMostStreams = 8;
constexpr std::int64_t kMostTileRows = 65535;  // instances are a grid's y extent
constexpr std::int64_t kLargestTaskHeadDim = 256;
// cuBLAS's own recommendation for Hopper; its documentation of cublasSetWorkspace.
constexpr std::int64_t kLibraryWorkspaceBytes = std::int64_t{32} << 20;
constexpr std::int64_t kAlignment = 256;
constexpr std::size_t kMostRecordings = 256;
// A node costs the driver some kilobytes on the host and on the device, and a graph's instantiation some microseconds for each.
constexpr std::int64_t kMostGraphNodes = 32768;
constexpr std::int64_t kMostNodesOfAllGraphs = 65536;
constexpr std::int64_t kNodesPerTile = 4;  // pointers, product, softmax, product

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }
std::int64_t ceil_div(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

std::int64_t score_bytes(const CublasTiling& tiling) { return round_up(tiling.rows * round_up(tiling.k_tile, 128) * 4, kAlignment); }
std::int64_t pointer_array_bytes(const CublasTiling& tiling) {
  return round_up(tiling.rows * static_cast<std::int64_t>(sizeof(void*)), kAlignment);
}
std::int64_t lane_bytes(const CublasTiling& tiling) {
  return score_bytes(tiling) + 5 * pointer_array_bytes(tiling) + kLibraryWorkspaceBytes;
}

void require(bool condition, const char* message) {
  if (!condition) { throw std::invalid_argument(message); }
}

void validate(const CublasTiling& tiling) {
  require(tiling.streams >= 1 && tiling.streams <= kMostStreams, "CublasTiling: streams must be 1..8");
  require(tiling.rows >= 1 && tiling.rows <= kMostTileRows, "CublasTiling: rows must be 1..65535");
  require(tiling.q_tile >= 1 && tiling.causal_q_tile >= 1, "CublasTiling: q_tile and causal_q_tile must be positive");
  require(tiling.k_tile >= 1 && tiling.k_tile <= kMostTileKeys, "CublasTiling: k_tile must be 1..4096");
}

void validate(const AttendTask& task) {
  require(task.batch >= 1 && task.segments >= 1 && task.q_rows >= 1 && task.k_rows >= 1 && task.kv_heads >= 1 && task.q_per_kv >= 1,
          "AttendTask: extents must be at least 1");
  require(task.head_dim >= 1 && task.head_dim <= kLargestTaskHeadDim, "AttendTask: head_dim must be 1..256");
  switch (task.mask) {
    case Mask::none:
      return;
    case Mask::causal:
      break;
  }
  require(task.q_positions.stride >= 1 && task.k_positions.stride >= 1, "AttendTask: positions of a causal task must increase");
}

std::int64_t instances_of(const AttendTask& task) { return task.batch * task.segments * task.kv_heads * task.q_per_kv; }

/// A stream with all that a tile in flight on it needs.
class Lane {
 public:
  Lane() {
    try {
      ANNULUS_KERNELS_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
      ANNULUS_KERNELS_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
      ANNULUS_KERNELS_CHECK(cublasCreate(&handle_));
      ANNULUS_KERNELS_CHECK(cublasSetStream(handle_, stream_));
    } catch (...) {
      destroy();
      throw;
    }
  }
  Lane(Lane&& other) noexcept
      : stream_(std::exchange(other.stream_, nullptr)),
        event_(std::exchange(other.event_, nullptr)),
        handle_(std::exchange(other.handle_, nullptr)),
        memory_(std::exchange(other.memory_, nullptr)),
        tiling_(other.tiling_),
        scores_(std::exchange(other.scores_, nullptr)),
        pointers_(std::exchange(other.pointers_, {})) {}
  Lane& operator=(Lane&&) = delete;
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  ~Lane() { destroy(); }

  void use_memory(std::byte* memory, const CublasTiling& tiling) {
    if (memory == memory_ && tiling == tiling_) { return; }
    ANNULUS_KERNELS_CHECK(cublasSetWorkspace(handle_, memory, static_cast<std::size_t>(kLibraryWorkspaceBytes)));
    std::byte* next = memory + kLibraryWorkspaceBytes;
    const auto array = [&] { return std::exchange(next, next + pointer_array_bytes(tiling)); };
    pointers_.k = reinterpret_cast<const void**>(array());
    pointers_.q = reinterpret_cast<const void**>(array());
    pointers_.v = reinterpret_cast<const void**>(array());
    pointers_.scores = reinterpret_cast<void**>(array());
    pointers_.acc = reinterpret_cast<void**>(array());
    scores_ = reinterpret_cast<float*>(next);
    memory_ = memory;
    tiling_ = tiling;
  }

  /// The next use_memory() tells the library anew, even if memory comes to lie at the same place.
  void forget_memory() { memory_ = nullptr; }

  cudaStream_t stream() const { return stream_; }
  cudaEvent_t event() const { return event_; }
  cublasHandle_t handle() const { return handle_; }
  float* scores() const { return scores_; }
  const TilePointers& pointers() const { return pointers_; }

 private:
  void destroy() noexcept {
    // Failures here have nobody to tell: the work they belong to has been checked when it was enqueued.
    if (handle_ != nullptr) { static_cast<void>(cublasDestroy(handle_)); }
    if (event_ != nullptr) { static_cast<void>(cudaEventDestroy(event_)); }
    if (stream_ != nullptr) { static_cast<void>(cudaStreamDestroy(stream_)); }
  }

  cudaStream_t stream_ = nullptr;
  cudaEvent_t event_ = nullptr;
  cublasHandle_t handle_ = nullptr;
  std::byte* memory_ = nullptr;
  CublasTiling tiling_;
  float* scores_ = nullptr;
  TilePointers pointers_;
};

struct Destroy {
  // As in ~Lane: nobody to tell.
  void operator()(cudaEvent_t event) const noexcept { static_cast<void>(cudaEventDestroy(event)); }
  void operator()(cudaGraph_t graph) const noexcept { static_cast<void>(cudaGraphDestroy(graph)); }
  void operator()(cudaGraphExec_t graph) const noexcept { static_cast<void>(cudaGraphExecDestroy(graph)); }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

Owned<cudaEvent_t> make_event() {
  cudaEvent_t event = nullptr;
  ANNULUS_KERNELS_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return Owned<cudaEvent_t>(event);
}

/// While it lasts, work enqueued on the stream, and on those that join it through events, is recorded instead of run.
class Capture {
 public:
  // Thread-local: what other threads ask of the device meanwhile (transports, watchdogs) is none of its business.
  explicit Capture(cudaStream_t stream) : stream_(stream) {
    ANNULUS_KERNELS_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  ~Capture() {
    if (stream_ == nullptr) { return; }
    cudaGraph_t graph = nullptr;
    static_cast<void>(cudaStreamEndCapture(stream_, &graph));
    const Owned<cudaGraph_t> dropped(graph);
    static_cast<void>(cudaGetLastError());
  }
  /// @returns what was recorded; every stream is out of the capture, also when this throws
  Owned<cudaGraph_t> end() {
    cudaGraph_t graph = nullptr;
    const cudaError_t status = cudaStreamEndCapture(std::exchange(stream_, nullptr), &graph);
    Owned<cudaGraph_t> owner(graph);
    check(status, "cudaStreamEndCapture");
    return owner;
  }

 private:
  cudaStream_t stream_;
};

/// A list of tasks that has been asked for, and the graph of it. The nodes hold addresses: of the tasks' memory and of the workspace, where
/// the arrays of pointers lie too; these are written by a node ahead of the products that read them.
struct Recording {
  std::vector<AttendTask> tasks;
  CublasTiling tiling;
  const std::byte* workspace = nullptr;
  bool recordable = false;  ///< not too large, and no attempt has failed
  std::int64_t nodes = 0;   ///< of the graph; without one, as many as are expected
  std::int64_t last_use = 0;
  Owned<cudaGraphExec_t> graph;
};

/// Types and mode of the two products of a task.
struct Products {
  cudaDataType_t element;
  cublasComputeType_t compute;
};

Products products_of(DType dtype) {
  switch (dtype) {
    case DType::fp16:
      return {CUDA_R_16F, CUBLAS_COMPUTE_32F};
    case DType::bf16:
      return {CUDA_R_16BF, CUBLAS_COMPUTE_32F};
    case DType::fp32:
      break;
  }
  // Pedantic: no TF32, whatever the environment says.
  return {CUDA_R_32F, CUBLAS_COMPUTE_32F_PEDANTIC};
}

bool follows(std::int64_t outer, std::int64_t inner, std::int64_t inner_count) { return outer == inner * inner_count; }

/// The instances of a task over as few axes as its strides allow, the longest last.
InstanceMap instances_over(const AttendTask& task) {
  std::vector<InstanceAxis> axes;
  const auto add = [&](std::int64_t count, std::int64_t TaskStrides::* stride, bool of_kv) {
    if (count == 1) { return; }
    axes.push_back(
        {count, {task.q_strides.*stride, of_kv ? task.kv_strides.*stride : 0, task.acc_strides.*stride, task.stat_strides.*stride}});
  };
  add(task.batch, &TaskStrides::batch, true);
  add(task.segments, &TaskStrides::segment, true);
  add(task.kv_heads, &TaskStrides::kv_head, true);
  add(task.q_per_kv, &TaskStrides::head, false);

  const auto joins = [](const InstanceAxis& outer, const InstanceAxis& inner) {
    return follows(outer.stride.q, inner.stride.q, inner.count) && follows(outer.stride.kv, inner.stride.kv, inner.count) &&
           follows(outer.stride.acc, inner.stride.acc, inner.count) && follows(outer.stride.stat, inner.stride.stat, inner.count);
  };
  for (bool joined = true; joined;) {
    joined = false;
    for (std::size_t i = 0; i < axes.size() && !joined; ++i) {
      for (std::size_t j = 0; j < axes.size() && !joined; ++j) {
        if (i == j || !joins(axes[i], axes[j])) { continue; }
        axes[j].count *= axes[i].count;
        axes.erase(axes.begin() + static_cast<std::ptrdiff_t>(i));
        joined = true;
      }
    }
  }
  if (axes.empty()) { axes.push_back({}); }
  std::stable_sort(axes.begin(), axes.end(), [](const InstanceAxis& a, const InstanceAxis& b) { return a.count < b.count; });

  InstanceMap map;
  map.axes = static_cast<int>(axes.size());
  std::copy(axes.begin(), axes.end(), map.axis);
  return map;
}

InstanceOffsets operator+(const InstanceOffsets& a, const InstanceOffsets& b) {
  return {a.q + b.q, a.kv + b.kv, a.acc + b.acc, a.stat + b.stat};
}
InstanceOffsets operator*(std::int64_t factor, const InstanceOffsets& a) {
  return {factor * a.q, factor * a.kv, factor * a.acc, factor * a.stat};
}

/// Query rows [q_begin, q_end) of some instances of a task, with all keys they see, tile after tile on one lane.
struct Chain {
  const AttendTask* task = nullptr;
  InstanceMap map;          ///< of the chain's instances; `base` already added when they lie on one axis
  InstanceOffsets base;     ///< of instance 0 of the map
  bool by_pointer = false;  ///< instances lie on several axes: the products take arrays of pointers
  std::int64_t instances = 0;
  std::int64_t q_begin = 0;
  std::int64_t q_end = 0;
  std::int64_t k_next = 0;
  std::int64_t k_end = 0;
  std::int64_t k_step = 0;
};

/// First row of [begin, end) that sees more than `keys` keys; end if none does.
std::int64_t first_row_that_sees(const AttendTask& task, std::int64_t begin, std::int64_t end, std::int64_t keys) {
  while (begin < end) {
    const std::int64_t middle = begin + (end - begin) / 2;
    if (visible_keys(task, middle) > keys) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

/// Whether arrays of pointers may be used: cuBLAS chooses its kernels without looking at them and wants 16 bytes.
bool pointers_aligned(const AttendTask& task) {
  const std::int64_t per_16_bytes = 16 / size_of(task.dtype);
  const auto fits = [](const void* pointer, const TaskStrides& strides, std::int64_t unit) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0 && strides.batch % unit == 0 && strides.segment % unit == 0 &&
           strides.row % unit == 0 && strides.kv_head % unit == 0 && strides.head % unit == 0;
  };
  return task.head_dim % per_16_bytes == 0 && fits(task.q, task.q_strides, per_16_bytes) && fits(task.k, task.kv_strides, per_16_bytes) &&
         fits(task.v, task.kv_strides, per_16_bytes) && fits(task.acc, task.acc_strides, 4);
}

/// Query rows of one head in a tile, at most.
std::int64_t query_tile_of(const AttendTask& task, const CublasTiling& tiling) {
  switch (task.mask) {
    case Mask::none:
      return tiling.q_tile;
    case Mask::causal:
      break;
  }
  // A diagonal tile is computed whole, which wastes 1 part in 1 + q_rows / q_limit of the work.
  return std::min(tiling.causal_q_tile, std::max<std::int64_t>(128, round_up(ceil_div(task.q_rows, 8), 64)));
}

/// Cuts a task into chains.
void append_chains(const AttendTask& task, const CublasTiling& tiling, std::vector<Chain>& chains) {
  const InstanceMap all = instances_over(task);
  const InstanceAxis& last = all.axis[all.axes - 1];
  const std::int64_t total = instances_of(task);

  const std::int64_t q_limit = std::min(query_tile_of(task, tiling), tiling.rows);
  const std::int64_t q_tiles = ceil_div(task.q_rows, q_limit);
  const std::int64_t q_step = std::min({task.q_rows, q_limit, round_up(ceil_div(task.q_rows, q_tiles), 64)});
  const std::int64_t wanted = std::max<std::int64_t>(1, tiling.rows / q_step);

  // One axis has a constant stride, which suits the library best; several are worth a pointer array when the axis is far too short.
  const bool by_pointer = all.axes > 1 && 4 * last.count <= std::min(wanted, total) && pointers_aligned(task);
  const std::int64_t run = by_pointer ? total : last.count;
  const std::int64_t groups = ceil_div(run, std::min(wanted, run));
  const std::int64_t group_size = ceil_div(run, groups);

  for (std::int64_t outer = 0; outer < total / run; ++outer) {
    InstanceOffsets outer_offset;
    if (!by_pointer) {
      std::int64_t rest = outer;
      for (int a = all.axes - 2; a >= 0; --a) {
        outer_offset = outer_offset + (rest % all.axis[a].count) * all.axis[a].stride;
        rest /= all.axis[a].count;
      }
    }
    for (std::int64_t first = 0; first < run; first += group_size) {
      // Under a causal mask the last rows see most: the long chains go first.
      for (std::int64_t tile = ceil_div(task.q_rows, q_step) - 1; tile >= 0; --tile) {
        Chain chain;
        chain.task = &task;
        chain.by_pointer = by_pointer;
        chain.instances = std::min(group_size, run - first);
        chain.q_begin = tile * q_step;
        chain.q_end = std::min(chain.q_begin + q_step, task.q_rows);
        // 64: rows of probabilities stay multiples of 16 bytes, and the product over keys gets no ragged end.
        chain.k_end = std::min(round_up(visible_keys(task, chain.q_end - 1), 64), task.k_rows);
        if (chain.k_end == 0) { continue; }
        chain.k_step = round_up(ceil_div(chain.k_end, ceil_div(chain.k_end, tiling.k_tile)), 128);
        if (chain.k_step > tiling.k_tile) { chain.k_step = tiling.k_tile; }
        if (by_pointer) {
          chain.map = all;
          chain.map.first = to_int(first);
        } else {
          chain.map.axes = 1;
          chain.map.axis[0] = last;
          chain.base = outer_offset + first * last.stride;
        }
        chains.push_back(chain);
      }
    }
  }
}

/// Sorted intervals that a task's acc rows touch, in bytes modulo `period`; empty if they may touch anything.
std::vector<std::pair<std::int64_t, std::int64_t>> acc_residues(const AttendTask& task, std::int64_t period) {
  std::vector<std::pair<std::int64_t, std::int64_t>> intervals;
  const auto base = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(task.acc) % static_cast<std::uintptr_t>(period));
  for (std::int64_t kv_head = 0; kv_head < task.kv_heads; ++kv_head) {
    for (std::int64_t head = 0; head < task.q_per_kv; ++head) {
      const std::int64_t at = (base + 4 * (kv_head * task.acc_strides.kv_head + head * task.acc_strides.head)) % period;
      const std::int64_t end = at + 4 * task.head_dim;
      intervals.emplace_back(at, std::min(end, period));
      if (end > period) { intervals.emplace_back(0, end - period); }
    }
  }
  std::sort(intervals.begin(), intervals.end());
  return intervals;
}

/// Whether two tasks certainly share no row of acc. Proved by looking at addresses modulo the common divisor of all strides but those of
/// the heads: tasks of different heads, or of the same heads at different offsets of a dilation, differ there.
bool disjoint(const AttendTask& a, const AttendTask& b) {
  std::int64_t period = 0;
  const auto fold = [&](std::int64_t count, std::int64_t stride) {
    if (count > 1) { period = std::gcd(period, 4 * stride); }
  };
  for (const AttendTask* task : {&a, &b}) {
    fold(task->batch, task->acc_strides.batch);
    fold(task->segments, task->acc_strides.segment);
    fold(task->q_rows, task->acc_strides.row);
  }
  if (period == 0) { return false; }
  const auto mine = acc_residues(a, period);
  const auto other = acc_residues(b, period);
  auto i = mine.begin();
  auto j = other.begin();
  while (i != mine.end() && j != other.end()) {
    if (i->first < j->second && j->first < i->second) { return false; }
    if (i->second <= j->second) {
      ++i;
    } else {
      ++j;
    }
  }
  return true;
}

/// Enqueues the next tile of `chain` on `lane`. @returns its scores, as a measure of its cost
std::int64_t enqueue_tile(Chain& chain, const Lane& lane) {
  const AttendTask& task = *chain.task;
  const std::int64_t k_begin = chain.k_next;
  const std::int64_t k_end = std::min(k_begin + chain.k_step, chain.k_end);
  chain.k_next = k_end;
  const std::int64_t q_begin = first_row_that_sees(task, chain.q_begin, chain.q_end, k_begin);
  const std::int64_t rows = chain.q_end - q_begin;
  const std::int64_t cols = k_end - k_begin;
  if (rows == 0) { return 0; }

  const std::int64_t element_size = size_of(task.dtype);
  const std::int64_t ld = round_up(cols, 32);
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
  if (visible_keys(task, q_begin) < k_end) {
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

CublasTiling default_tiling(std::int64_t head_dim, DType dtype, Mask mask) {
  struct Row {
    std::int64_t largest_head_dim;
    CublasTiling dense;
    CublasTiling causal;
  };
  // Fastest of `annulus_cuda_rates --sweep` on an H100 with bf16. Scores in flight = streams * rows * k_tile * 4 bytes: 32 MiB of its 50 MB
  // of L2. A list of one mask ignores the q_tile of the other; those of a mixed one stay sensible.
  static constexpr std::array<Row, 3> kHalf{{
      {64, {1, 4096, 2048, 512, 2048}, {1, 8192, 2048, 512, 1024}},
      {128, {1, 4096, 2048, 512, 2048}, {1, 8192, 2048, 512, 1024}},
      {256, {2, 2048, 2048, 512, 2048}, {1, 4096, 2048, 512, 2048}},
  }};
  // fp32 products are ten times slower: everything else is hidden, and the tiles need only fill the machine.
  static constexpr CublasTiling kSingle{2, 2048, 1024, 512, 2048};
  switch (dtype) {
    case DType::fp32:
      return kSingle;
    case DType::fp16:
    case DType::bf16:
      break;
  }
  const auto* row = std::find_if(kHalf.begin(), kHalf.end() - 1, [&](const Row& each) { return head_dim <= each.largest_head_dim; });
  switch (mask) {
    case Mask::causal:
      return row->causal;
    case Mask::none:
      break;
  }
  return row->dense;
}

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
    for (std::size_t i = 0; i < used_; ++i) { lanes_[i].use_memory(workspace + static_cast<std::int64_t>(i) * lane_bytes(tiling), tiling); }
    // An earlier call on another stream may still use the workspace.
    ANNULUS_KERNELS_CHECK(cudaStreamWaitEvent(stream, done_.get(), 0));
    if (submission_ == Submission::eager) {
      enqueue(tasks, tiling, stream);
    } else {
      submit(tasks, tiling, workspace, stream);
    }
    ANNULUS_KERNELS_CHECK(cudaEventRecord(done_.get(), stream));
  }

  void forget(const std::byte* workspace) {
    for (Recording& each : recordings_) {
      if (each.workspace == workspace) { drop_graph(each); }
    }
    std::erase_if(recordings_, [&](const Recording& each) { return each.workspace == workspace; });
    for (Lane& lane : lanes_) { lane.forget_memory(); }
  }

  std::int64_t recordings() const { return static_cast<std::int64_t>(recordings_.size()); }
  std::int64_t graph_launches() const { return graph_launches_; }

 private:
  /// Launches the list's graph, or enqueues the list and takes a step towards a graph of it.
  void submit(std::span<const AttendTask> tasks, const CublasTiling& tiling, const std::byte* workspace, cudaStream_t stream) {
    ++calls_;
    const auto known = std::find_if(recordings_.begin(), recordings_.end(), [&](const Recording& each) {
      return each.workspace == workspace && each.tiling == tiling &&
             std::equal(each.tasks.begin(), each.tasks.end(), tasks.begin(), tasks.end());
    });
    if (known == recordings_.end()) {
      // Eager the first time: the library and the driver load what they need.
      const std::int64_t nodes = kNodesPerTile * enqueue(tasks, tiling, stream);
      remember({{tasks.begin(), tasks.end()}, tiling, workspace, nodes <= kMostGraphNodes, nodes, calls_, nullptr});
      return;
    }
    known->last_use = calls_;
    if (known->graph == nullptr && known->recordable && make_room(known->nodes)) { record(*known, stream); }
    if (known->graph == nullptr || !launch(*known, stream)) { enqueue(tasks, tiling, stream); }
  }

  /// Keeps `recording` in place of the one unused for longest.
  void remember(Recording recording) {
    if (recordings_.size() < kMostRecordings) {
      recordings_.push_back(std::move(recording));
      return;
    }
    const auto oldest = std::min_element(recordings_.begin(), recordings_.end(),
                                         [](const Recording& a, const Recording& b) { return a.last_use < b.last_use; });
    drop_graph(*oldest);
    *oldest = std::move(recording);
  }

  /// Drops graphs out of use, if need be. Those in use stay: a loop over more than fits would drop each before its turn comes.
  /// @returns whether a graph of `nodes` may be added
  bool make_room(std::int64_t nodes) {
    if (nodes_ + nodes <= kMostNodesOfAllGraphs) { return true; }
    for (Recording& each : recordings_) {
      if (calls_ - each.last_use > 2 * static_cast<std::int64_t>(kMostRecordings)) { drop_graph(each); }
    }
    return nodes_ + nodes <= kMostNodesOfAllGraphs;
  }

  void drop_graph(Recording& recording) {
    if (recording.graph == nullptr) { return; }
    ANNULUS_KERNELS_CHECK(cudaEventSynchronize(done_.get()));  // it may be running
    recording.graph.reset();
    nodes_ -= recording.nodes;
  }

  /// Makes the graph of a list. Without success the list stays eager: what is really broken will fail there, with better words.
  void record(Recording& recording, cudaStream_t stream) {
    try {
      Capture capture(stream);
      enqueue(recording.tasks, recording.tiling, stream);
      const Owned<cudaGraph_t> graph = capture.end();
      std::size_t nodes = 0;
      ANNULUS_KERNELS_CHECK(cudaGraphGetNodes(graph.get(), nullptr, &nodes));
      recording.recordable = nodes <= static_cast<std::size_t>(kMostGraphNodes);
      if (!recording.recordable) { return; }
      cudaGraphExec_t executable = nullptr;
      ANNULUS_KERNELS_CHECK(cudaGraphInstantiate(&executable, graph.get(), 0));
      recording.graph.reset(executable);
      recording.nodes = static_cast<std::int64_t>(nodes);
      nodes_ += recording.nodes;
    } catch (const LibraryError&) { recording.recordable = false; }
  }

  /// @returns false if there was nothing to launch after all; nothing is enqueued then
  bool launch(Recording& recording, cudaStream_t stream) {
    if (cudaGraphLaunch(recording.graph.get(), stream) == cudaSuccess) {
      ++graph_launches_;
      return true;
    }
    static_cast<void>(cudaGetLastError());
    drop_graph(recording);
    recording.recordable = false;
    return false;
  }

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

  /// Enqueues all chains; the lane with least work takes the next tile, so that lanes fill together and end together.
  void run_chains() {
    std::array<std::int64_t, kMostStreams> cost{};
    std::array<Chain*, kMostStreams> current{};
    std::size_t next = 0;
    for (;;) {
      std::size_t least = used_;
      for (std::size_t i = 0; i < used_; ++i) {
        if (current[i] == nullptr && next == chains_.size()) { continue; }
        if (least == used_ || cost[i] < cost[least]) { least = i; }
      }
      if (least == used_) { return; }
      if (current[least] == nullptr) { current[least] = &chains_[next++]; }
      Chain& chain = *current[least];
      const std::int64_t scores = enqueue_tile(chain, lanes_[least]);
      cost[least] += scores;
      if (scores > 0) { ++tiles_; }
      if (chain.k_next >= chain.k_end) { current[least] = nullptr; }
    }
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
  std::vector<Recording> recordings_;
  std::int64_t nodes_ = 0;  ///< of all graphs
  std::int64_t calls_ = 0;
  std::int64_t graph_launches_ = 0;
  Owned<cudaEvent_t> start_ = make_event();
  Owned<cudaEvent_t> done_ = make_event();  ///< the end of the latest call
};

CublasAttention::CublasAttention(Submission submission) : implementation_(std::make_unique<Implementation>(submission)) {}
CublasAttention::CublasAttention(CublasAttention&&) noexcept = default;
CublasAttention& CublasAttention::operator=(CublasAttention&&) noexcept = default;
CublasAttention::~CublasAttention() {
  // Destroying a cuBLAS handle waits for the device too.
  if (std::uncaught_exceptions() > exceptions_at_start_) { [[maybe_unused]] const Implementation* left = implementation_.release(); }
}

std::int64_t CublasAttention::workspace_bytes(const CublasTiling& tiling) { return tiling.streams * lane_bytes(tiling); }

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
