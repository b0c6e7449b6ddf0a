// SPDX-License-Identifier: Apache-2.0
// A problem for the fused kernel alone: dilated attention cut into the records of any number of ranks, the memory it needs, and what its
// rows must be in fp64.
#pragma once

#include <annulus/kernels/dtype.hpp>
#include <annulus/kernels/fused.hpp>

#include "device_memory.hpp"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace annulus::fused_test {

namespace fused = kernels::cuda::fused;

/// Segments of length w at rate r, for a range of heads; head h has offset h mod r, h counted in KV heads.
struct Branch {
  std::int64_t segment_length = 0;
  std::int64_t rate = 1;
  std::int64_t first_kv_head = 0;
  std::int64_t kv_heads = 0;
};

struct Problem {
  DType dtype = DType::bf16;
  std::int64_t batch = 1;
  std::int64_t seq_len = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  bool causal = false;
  double scale = 0.0;            ///< 0: 1 / sqrt(head_dim)
  std::vector<Branch> branches;  ///< each head in one branch
  std::int64_t ranks = 1;        ///< shards of the sequence, contiguous
  fused::KeyOrder order = fused::KeyOrder::cyclic;
};

/// One branch over all heads; w = seq_len, r = 1 is plain attention.
Problem plain(std::int64_t batch, std::int64_t seq_len, std::int64_t heads, std::int64_t head_dim, bool causal = false);

/// Rows that attend each other: first + i * rate, for query heads of one KV head or, at rate 1, of all.
struct Segment {
  std::int64_t batch = 0;
  std::int64_t first_head = 0;
  std::int64_t heads = 0;
  std::int64_t first = 0;
  std::int64_t rate = 1;
  std::int64_t count = 0;
};
std::vector<Segment> segments_of(const Problem& problem);

/// The records of every step of all ranks; operands are 0 = Q, 1 = K, 2 = V, whole.
struct Steps {
  std::vector<std::vector<fused::Record>> records;
  std::int64_t partials = 0;
};
Steps steps_of(const Problem& problem);

double scale_of(const Problem& problem);
/// 4 head_dim for every pair of a query and a key that it sees.
double flops_of(const Problem& problem);

/// Values of Q, K and V by element, as floats that are exact in the problem's dtype.
struct Values {
  std::function<float(std::int64_t)> q;
  std::function<float(std::int64_t)> k;
  std::function<float(std::int64_t)> v;
};

/// A problem on the device: inputs, poisoned results, and the launches that compute it.
class Device {
 public:
  /// Inputs are `noise`, Q, K and V from different places of it.
  Device(const Problem& problem, const Noise& noise);
  /// Inputs are bits of the dtype, [batch, seq_len, heads or kv_heads, head_dim].
  Device(const Problem& problem, const std::vector<std::uint16_t>& q, const std::vector<std::uint16_t>& k,
         const std::vector<std::uint16_t>& v);

  /// Fills O, LSE and the partials with bytes of `poison`.
  void poison(int byte);
  /// Enqueues every step. `cycles`: room for one number for each step, or null.
  void run(cudaStream_t stream, unsigned long long* cycles = nullptr);
  std::size_t steps() const { return steps_.size(); }
  std::int64_t partial_bytes() const { return partial_.bytes(); }

  const DeviceMemory& out() const { return out_; }
  const DeviceMemory& lse() const { return lse_; }
  const Values& values() const { return values_; }

 private:
  Device(const Problem& problem, DeviceMemory q, DeviceMemory k, DeviceMemory v, Values values);

  struct Step {
    fused::Launcher launcher;
    DeviceMemory tiles;
    DeviceMemory redo;
    std::int32_t count;
  };
  Problem problem_;
  DeviceMemory q_;
  DeviceMemory k_;
  DeviceMemory v_;
  DeviceMemory out_;
  DeviceMemory lse_;
  DeviceMemory partial_;
  DeviceMemory ticket_;
  std::int32_t drawn_ = 0;
  int blocks_ = 0;
  Values values_;
  std::vector<Step> steps_;
};

/// How far rows are from fp64.
struct Error {
  double relative_rms = 0.0;  ///< of O, over all compared rows
  double lse = 0.0;           ///< largest absolute difference
  std::int64_t rows = 0;
  std::int64_t misplaced = 0;  ///< NaN or infinity on one side only
};
/// Compares `samples` rows of random segments, the last rows of segments among them; 0: every row of every head.
Error compare(const Problem& problem, const Device& device, std::int64_t samples, std::uint32_t seed);

}  // namespace annulus::fused_test
