// SPDX-License-Identifier: Apache-2.0
// A rank's part of a multihead layer: its rows of x become its rows of Q, K and V, and its rows of O become its rows of y.
#pragma once

#include <annulus/attention/executor.hpp>
#include <annulus/attention/layer_kernel.hpp>
#include <annulus/device/device.hpp>
#include <annulus/io/layer_source.hpp>
#include <annulus/job/watchdog.hpp>

#include <cstdint>
#include <map>
#include <memory>

namespace annulus {

/// What a layer takes on one rank that owns `rows` tokens of each batch entry.
struct LayerCost {
  double flops = 0;                   ///< 2 for each number of a weight matrix and row that meets it
  std::int64_t activation_bytes = 0;  ///< x, its like and y: in proportion to rows
  std::int64_t weight_bytes = 0;      ///< once for all ranks of a process
  std::int64_t scratch_bytes = 0;     ///< once for all ranks of a process, bounded
};

/// `layer` and `dtype` are those of the run, `host_memory` says where it runs. @throws InvalidArgument if it is beyond 2^62 bytes
LayerCost layer_cost(const LayerSource& source, const Layer& layer, const Problem& problem, std::int64_t rows, bool host_memory);

/// Host memory that reading weights takes besides.
std::int64_t weight_reading_bytes(const LayerSource& source, DType dtype);

/// What the ranks of one process share: the weights in memory of the device, scratch, and the kernel.
class LayerResources {
 public:
  /// Allocates; all arguments must outlive it. `rows`: most that a rank owns of a batch entry.
  LayerResources(const LayerSource& source, const Layer& layer, const Problem& problem, std::int64_t rows, int threads, Device& device,
                 Queue& queue);

  /// Reads all weights. Matrices are rounded to the problem's dtype once, and turned round: they lie [in features, out features]. Vectors
  /// stay fp32. Returns when they are in place.
  void load();

  const LayerSource& source() const { return source_; }
  const Layer& layer() const { return layer_; }
  LayerKernel& kernel() const { return *kernel_; }
  /// Null where the layer has no such weight.
  const std::byte* matrix(Weight which) const;
  const float* vector(Weight which) const;
  /// Of a vector; 0 where there is none.
  std::int64_t length(Weight which) const;

  std::int64_t chunk_rows() const { return chunk_rows_; }
  float* products() const { return reinterpret_cast<float*>(products_.get()); }  ///< [chunk_rows, the most features of a product]
  std::byte* rows() const { return rows_.get(); }                                ///< [chunk_rows, heads * head_dim] in the problem's dtype

 private:
  const LayerSource& source_;
  const Layer& layer_;
  DType dtype_;
  Device& device_;
  Queue& queue_;
  std::unique_ptr<LayerKernel> kernel_;
  std::int64_t chunk_rows_;
  Buffer products_;
  Buffer rows_;
  std::map<Weight, Buffer> weights_;
};

/// Around one rank's executor. Everything is enqueued on the queue; all arguments must outlive it.
class LayerExecutor {
 public:
  LayerExecutor(const LayerResources& resources, RingExecutor& ring, Device& device, Queue& queue, Watchdog& watchdog);

  /// Reads the rank's rows of x, and places the appended keys if it owns them; the ring's batch entries are the source's from `first_batch`
  /// on. Returns when they are in place.
  void load(std::int64_t first_batch);

  /// Makes Q, K and V of x, where the ring's plan keeps them.
  void project();
  /// Makes y of O.
  void finish();

  /// Milliseconds on the queue of the last project(), the last finish(), and from the begin of project() of `first` to the end of finish().
  /// Wait for the queue.
  double project_ms();
  double finish_ms();
  double ms_since_begin_of(const LayerExecutor& first);

  /// Local rows [first, first+count) of one batch entry of y, [count, embed] in the problem's dtype, to host memory.
  void read_output(std::int64_t batch, std::int64_t first, std::int64_t count, void* rows);

 private:
  /// Neighbouring rows of a rank, of one batch entry.
  struct Chunk {
    std::int64_t batch = 0;
    std::int64_t global = 0;
    std::int64_t local = 0;
    std::int64_t count = 0;
  };
  /// Calls visit(chunk) for all rows, up to `most` at a time.
  template <class Visit>
  void for_each_chunk(std::int64_t most, const Visit& visit);

  void place_appended_keys();
  std::byte* activation_rows(Activation which, const Chunk& chunk) const;
  std::byte* output_rows(const Chunk& chunk) const;
  /// What project() makes of one tensor.
  void project(Tensor tensor, const Chunk& chunk);
  void finish(const Chunk& chunk);
  /// Rows that meet a weight, and the bias that follows if there is one.
  struct Product {
    const std::byte* in = nullptr;
    Weight weight = Weight::wq;
    Weight bias = Weight::bq;
    std::int64_t in_features = 0;
    std::int64_t out_features = 0;
  };
  /// out = after(in W + bias); straight to its place where nothing comes after.
  void multiply(const Chunk& chunk, const Product& product, kernels::TransformTask after, std::byte* out) const;
  void take_norm(Norm norm, Weight weight, Weight bias, std::int64_t features, kernels::TransformTask& task) const;

  const LayerResources& resources_;
  RingExecutor& ring_;
  Device& device_;
  Queue& queue_;
  Watchdog& watchdog_;
  std::map<Activation, Buffer> activations_;
  Buffer output_;
  std::shared_ptr<Event> begin_, projected_, attended_, end_;
};

}  // namespace annulus
