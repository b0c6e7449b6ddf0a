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
#include <span>
#include <vector>

namespace annulus {

/// Where the tensors of one rank begin.
struct TensorAddresses {
  std::byte* q = nullptr;             ///< [batch, local rows, heads, head_dim]
  std::byte* resident = nullptr;      ///< BufferId::resident
  std::byte* out = nullptr;           ///< as q
  float* lse = nullptr;               ///< [batch, heads, local rows]
  std::byte* dout = nullptr;          ///< as q; this and what follows where there are gradients
  std::byte* dq = nullptr;            ///< as q
  std::byte* dkv = nullptr;           ///< dK and dV as resident
  std::byte* own_gradient = nullptr;  ///< BufferId::own_gradient
  std::array<std::byte*, kSlots.size()> slots{};
  std::array<std::byte*, kSendBuffers.size()> sends{};
  std::byte* extra = nullptr;  ///< BufferId::extra
};

kernels::Combine combine_of(Mixing mixing);

/// Where a buffer begins.
std::byte* address_of(const TensorAddresses& addresses, BufferId buffer);

/// What one step of a plan moves.
struct LoweredTransfers {
  std::vector<kernels::PackTask> pack;
  std::vector<Outgoing> outgoing;
  std::vector<Incoming> incoming;
};

/// By step.
std::vector<LoweredTransfers> lower_transfers(const RingPlan& plan, const TensorAddresses& addresses);

/// What kernels do that take tasks, with partials of the whole shard.
struct LoweredWork {
  std::vector<kernels::ZeroKeysTask> zero_keys;          ///< what comes before all else
  std::vector<std::vector<kernels::AttendTask>> attend;  ///< by step, wave after wave
  kernels::FinishTask finish;
};

/// @param partials           as many as the plan has
/// @param accumulator_bytes  size of one number of a partial
LoweredWork lower_work(const RingPlan& plan, const TensorAddresses& addresses, std::span<const kernels::PartialPointers> partials,
                       std::int64_t accumulator_bytes);

/// What kernels do in a backward pass that take tasks. Steps are numbered as the plan's; those of the forward pass have nothing here.
struct LoweredGradients {
  kernels::BeginGradientsTask begin;
  std::vector<kernels::ClearTask> clear_own;                      ///< at the begin
  std::vector<std::vector<kernels::ClearTask>> clear;             ///< by step, before its work
  std::vector<std::vector<kernels::GradientTask>> differentiate;  ///< by step, wave after wave
  std::vector<std::vector<kernels::AddTask>> add;                 ///< by step, in their order
  std::vector<kernels::RoundTask> round;                          ///< at the end
};

/// Arguments as lower_work(). The running dQ is where the first partial's acc was.
LoweredGradients lower_gradients(const RingPlan& plan, const TensorAddresses& addresses, std::span<const kernels::PartialPointers> partials,
                                 std::int64_t accumulator_bytes);

}  // namespace annulus
