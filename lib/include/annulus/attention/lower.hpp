// SPDX-License-Identifier: Apache-2.0
// From a plan, which speaks of rows and buffers, to what devices and transports take: addresses, extents and strides. Pure: it needs no
// device, and reads no memory.
#pragma once

#include <annulus/kernels/tasks.hpp>
#include <annulus/plan/plan.hpp>
#include <annulus/transport/transport.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus {

/// Where the tensors of one rank begin.
struct TensorAddresses {
  std::byte* q = nullptr;         ///< [batch, local rows, heads, head_dim]
  std::byte* resident = nullptr;  ///< BufferId::resident
  std::byte* out = nullptr;       ///< as q
  float* lse = nullptr;           ///< [batch, heads, local rows]
  std::array<std::byte*, 2> slots{};
  std::array<std::byte*, 2> sends{};
  std::vector<kernels::PartialPointers> partials;  ///< as many as the plan has
};

/// What one step of a plan does.
struct LoweredStep {
  std::vector<kernels::PackTask> pack;
  std::vector<Outgoing> outgoing;
  std::vector<Incoming> incoming;
  std::vector<kernels::AttendTask> attend;  ///< wave after wave
};

struct LoweredPlan {
  std::vector<LoweredStep> steps;
  kernels::FinishTask finish;
};

/// @param accumulator_bytes size of one number of a partial
LoweredPlan lower(const RingPlan& plan, const TensorAddresses& addresses, std::int64_t accumulator_bytes);

}  // namespace annulus
