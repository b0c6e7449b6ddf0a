// SPDX-License-Identifier: Apache-2.0
// A session whose sequence is permuted: how its rows come from the input and go to the result.
#pragma once

#include <annulus/io/result_file.hpp>
#include <annulus/plan/plan.hpp>
#include <annulus/session/session.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace annulus {

/// What a result holds of gradients, in this order.
inline constexpr std::array<Tensor, 3> kGradients{Tensor::q, Tensor::k, Tensor::v};

/// Bytes of a row of O and of its LSE, all heads, and of its gradients where there are some.
std::int64_t result_row_bytes(const Problem& problem, ResultTensors tensors);

/// Neighbouring rows of O and LSE, and of gradients, of one batch entry.
struct ResultRows {
  std::int64_t batch = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
  std::vector<std::byte> output;                                    ///< [count, heads, head_dim]
  std::vector<float> lse;                                           ///< [heads, count]
  std::array<std::vector<std::byte>, kGradients.size()> gradients;  ///< [count, heads of the tensor, head_dim]; none without gradients

  /// Makes room for them.
  void resize(const Problem& problem, ResultTensors tensors);
};

/// Reads the Q, K and V of a ring, each of its processes a contiguous range of the input, and brings the rows to the ranks that own their
/// positions. Collective over the ring.
/// @throws AgreedError as TensorSource::read()
void load_permuted(const Session& session, const LocalRing& ring);

/// Brings O and LSE of a ring back into the order of the input, each of its processes a contiguous range of it. `take` is called on every
/// process for the rows of all of them, in one order, so that it may send them from one to another: on `process` of the ring with the rows,
/// on the others with room for them. It must not throw. Collective over the processes of the ring; another one may call it too, and has
/// room alone.
void collect_permuted(const Session& session, std::int64_t ring, const std::function<void(std::int64_t process, ResultRows& rows)>& take);

/// Host memory that both take at most on this process, which runs these plans.
/// @param problem  of a ring @param comm  of its processes
std::int64_t permuted_bytes(const Problem& problem, const Communicator& comm, std::span<const std::shared_ptr<const RingPlan>> plans);

/// What the results of a session are.
ResultTensors result_tensors(const Config& config);

}  // namespace annulus
