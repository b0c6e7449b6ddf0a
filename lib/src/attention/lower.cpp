// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/lower.hpp>

#include <annulus/core/error.hpp>
#include <annulus/plan/item_parts.hpp>

#include <algorithm>

namespace annulus {

namespace {

kernels::AttendTask attend_task(const RingPlan& plan, const TensorAddresses& addresses, const kernels::PartialPointers& partial,
                                std::int64_t accumulator, const WorkItem& item) {
  const Problem& problem = plan.problem;
  const std::int64_t rows = plan.local_rows;
  const std::int64_t q_pitch = problem.heads * problem.head_dim;
  const std::int64_t group_stride = item.heads.kv.stride * problem.group_size();
  const std::int64_t element = size_of(problem.dtype);
  const bool resident = item.keys.block < 0;
  const Progression& q_local = item.q_local.only();
  const Progression& k_stored = resident ? item.k_local.only() : item.k_packed.only();

  kernels::AttendTask task;
  task.dtype = problem.dtype;
  task.mask = item.mask;
  task.batch = problem.batch;
  task.segments = item.segments;
  task.q_rows = q_local.count;
  task.k_rows = k_stored.count;
  task.kv_heads = item.heads.kv.count;
  task.q_per_kv = item.heads.q_per_kv;
  task.head_dim = problem.head_dim;
  task.scale = problem.scale;

  const std::int64_t q_start = q_local.first * q_pitch + item.heads.q_first * problem.head_dim;
  task.q = addresses.q + q_start * element;
  task.q_strides = {rows * q_pitch, item.segment_stride * q_pitch, q_local.stride * q_pitch, group_stride * problem.head_dim,
                    problem.head_dim};
  task.acc = static_cast<std::byte*>(partial.acc) + q_start * accumulator;
  task.acc_strides = task.q_strides;
  const std::int64_t stat_start = item.heads.q_first * rows + q_local.first;
  task.max = static_cast<std::byte*>(partial.max) + stat_start * accumulator;
  task.sum = static_cast<std::byte*>(partial.sum) + stat_start * accumulator;
  task.stat_strides = {problem.heads * rows, item.segment_stride, q_local.stride, group_stride * rows, rows};

  // Keys: rows of a piece of the shard, or of a block that holds the class's heads next to each other.
  const KvBlock* block = resident ? nullptr : &plan.blocks[static_cast<std::size_t>(item.keys.block)];
  const ShardPiece* piece = resident ? &piece_at(plan.shard, k_stored.first) : nullptr;
  const std::int64_t stored_rows = resident ? piece->global.count : block->rows_global.count();
  const std::int64_t k_first = k_stored.first - (resident ? piece->local_first : 0);
  const Progression stored_heads = resident ? range(0, problem.kv_heads) : block->kv_heads;
  const Progression heads = indices_of(item.heads.kv, stored_heads);
  const std::int64_t k_pitch = stored_heads.count * problem.head_dim;
  const std::byte* base = address_of(addresses, item.keys.buffer) + item.keys.offset_bytes;
  const std::int64_t k_start = k_first * k_pitch + heads.first * problem.head_dim;
  task.k = base + k_start * element;
  task.v = base + (problem.batch * stored_rows * k_pitch + k_start) * element;
  task.kv_strides = {stored_rows * k_pitch, item.segment_stride * k_pitch, k_stored.stride * k_pitch, heads.stride * problem.head_dim, 0};
  task.q_positions = {item.q_global.only().first, item.q_global.only().stride};
  task.k_positions = {item.k_global.only().first, item.k_global.only().stride};
  task.place = item.place;
  task.dropout.dropout = problem.dropout;
  task.dropout.first_head = problem.window.first + item.heads.q_first;
  task.dropout.kv_head_step = item.heads.kv.stride * problem.group_size();
  task.dropout.q_segment_step = item.segment_stride;
  task.dropout.k_segment_step = problem.is_extra(item.k_global[0]) ? 0 : item.segment_stride;
  return task;
}

/// The task of a part of an item, from that of the item.
kernels::AttendTask task_of_part(kernels::AttendTask task, std::int64_t accumulator, const ItemPart& part) {
  const auto offset = [&](const kernels::TaskStrides& strides) {
    return part.first_entry * strides.batch + part.first_segment * strides.segment;
  };
  const std::int64_t element = size_of(task.dtype);
  task.q = static_cast<const std::byte*>(task.q) + offset(task.q_strides) * element;
  task.k = static_cast<const std::byte*>(task.k) + offset(task.kv_strides) * element;
  task.v = static_cast<const std::byte*>(task.v) + offset(task.kv_strides) * element;
  task.acc = static_cast<std::byte*>(task.acc) + offset(task.acc_strides) * accumulator;
  task.max = static_cast<std::byte*>(task.max) + offset(task.stat_strides) * accumulator;
  task.sum = static_cast<std::byte*>(task.sum) + offset(task.stat_strides) * accumulator;
  task.batch = part.entries;
  task.segments = part.segments;
  task.dropout.dropout.first_batch += part.first_entry;
  task.dropout.first_segment += part.first_segment;
  task.k_rows = part.keys;
  return task;
}

/// What the item gives to the gradients.
kernels::GradientTask gradient_task(const RingPlan& plan, const TensorAddresses& addresses,
                                    std::span<const kernels::PartialPointers> partials, std::int64_t accumulator, const WorkItem& item) {
  const std::int64_t element = size_of(plan.problem.dtype);
  const kernels::PartialPointers& own = partials[static_cast<std::size_t>(item.partial)];
  kernels::GradientTask task;
  task.attend = attend_task(plan, addresses, {partials.front().acc, own.max, own.sum}, accumulator, item);
  task.dout = addresses.dout + (static_cast<const std::byte*>(task.attend.q) - addresses.q);
  // They lie as the keys do, in another place and another type.
  const std::byte* const keys = address_of(addresses, item.keys.buffer) + item.keys.offset_bytes;
  float* const gradient = reinterpret_cast<float*>(address_of(addresses, item.gradient.buffer) + item.gradient.offset_bytes);
  task.dk = gradient + (static_cast<const std::byte*>(task.attend.k) - keys) / element;
  task.dv = gradient + (static_cast<const std::byte*>(task.attend.v) - keys) / element;
  return task;
}

/// The task of a part of an item, from that of the item.
kernels::GradientTask gradient_task_of_part(kernels::GradientTask task, std::int64_t accumulator, const ItemPart& part) {
  const auto offset = [&](const kernels::TaskStrides& strides) {
    return part.first_entry * strides.batch + part.first_segment * strides.segment;
  };
  task.dout = static_cast<const std::byte*>(task.dout) + offset(task.attend.q_strides) * size_of(task.attend.dtype);
  task.dk += offset(task.attend.kv_strides);
  task.dv += offset(task.attend.kv_strides);
  task.attend = task_of_part(task.attend, accumulator, part);
  return task;
}

/// Numbers of dK, or dV, of a block.
std::int64_t elements_of(const Problem& problem, const KvBlock& block) { return block.bytes / 2 / size_of(problem.dtype); }

kernels::ZeroKeysTask zero_keys_task(const kernels::AttendTask& task, std::int64_t count) {
  return {count, task.batch, task.segments, task.q_rows, task.kv_heads, task.q_per_kv, task.max, task.sum, task.stat_strides};
}

/// The task that moves K, or V, of a whole block, yet without addresses.
kernels::PackTask whole_block_task(const Problem& problem, const KvBlock& block) {
  kernels::PackTask task;
  task.element_size = size_of(problem.dtype);
  task.batch = problem.batch;
  task.rows = block.rows_global.count();
  task.heads = block.kv_heads.count;
  task.head_dim = problem.head_dim;
  task.src_head_stride = problem.head_dim;
  task.src_row_stride = block.kv_heads.count * problem.head_dim;
  task.src_batch_stride = task.rows * task.src_row_stride;
  return task;
}

/// Tasks that gather K, or V, of a block from a piece of the shard. Several runs of rows interleave with the batch in the block: each run
/// of each batch entry is a task then.
/// @param source  K, or V, of the piece @param target  of the block
void gather(std::vector<kernels::PackTask>& tasks, kernels::PackTask task, const Problem& problem, const KvBlock& block,
            const ShardPiece& piece, const Rows<Local>& rows, const std::byte* source, std::byte* target) {
  const std::int64_t pitch = problem.kv_heads * problem.head_dim;
  const std::int64_t tasks_of_run = rows.runs() == 1 ? 1 : problem.batch;
  const std::int64_t block_pitch = task.src_row_stride;
  task.batch = problem.batch / tasks_of_run;
  task.src_batch_stride = piece.global.count * pitch;
  task.src_head_stride = block.kv_heads.stride * problem.head_dim;
  for (std::int64_t b = 0; b < tasks_of_run; ++b) {
    std::int64_t packed = b * rows.count();
    for (std::int64_t run = 0; run < rows.runs(); ++run) {
      const Progression& local = rows.run(run);
      const std::int64_t first = b * piece.global.count + local.first - piece.local_first;
      task.rows = local.count;
      task.src_row_stride = local.stride * pitch;
      task.src = source + (first * pitch + block.kv_heads.first * problem.head_dim) * task.element_size;
      task.dst = target + packed * block_pitch * task.element_size;
      tasks.push_back(task);
      packed += local.count;
    }
  }
}

void add_pack_tasks(std::vector<kernels::PackTask>& tasks, const RingPlan& plan, const TensorAddresses& addresses, const PackItem& item) {
  const Problem& problem = plan.problem;
  const KvBlock& block = plan.blocks[static_cast<std::size_t>(item.block)];
  kernels::PackTask task = whole_block_task(problem, block);
  std::byte* const target = address_of(addresses, item.to) + item.to_offset_bytes;
  const std::byte* const source = address_of(addresses, item.from) + item.from_offset_bytes;
  const std::int64_t tensor_bytes = block.bytes / 2;
  for (std::int64_t tensor = 0; tensor < 2; ++tensor) {
    if (item.from == BufferId::resident) {
      const ShardPiece& piece = piece_at(plan.shard, item.from_rows[0]);
      const std::byte* const of_piece = source + resident_offset(problem, piece) + tensor * resident_bytes(problem, piece.global.count) / 2;
      gather(tasks, task, problem, block, piece, item.from_rows, of_piece, target + tensor * tensor_bytes);
      continue;
    }
    task.src = source + tensor * tensor_bytes;
    task.dst = target + tensor * tensor_bytes;
    tasks.push_back(task);
  }
}

/// Tasks that add dK and dV of a whole block to those of the same block elsewhere, or to the rows of the shard that they are of.
void add_sum_tasks(std::vector<kernels::AddTask>& tasks, const RingPlan& plan, const TensorAddresses& addresses, const SumItem& item) {
  const Problem& problem = plan.problem;
  const KvBlock& block = plan.blocks[item.block];
  const std::int64_t head_dim = problem.head_dim;
  const std::int64_t rows = block.rows_global.count();
  const std::int64_t block_pitch = block.kv_heads.count * head_dim;
  const auto* const source = reinterpret_cast<const float*>(address_of(addresses, item.from) + item.from_offset_bytes);
  kernels::AddTask task;
  task.heads = block.kv_heads.count;
  task.head_dim = head_dim;
  for (std::int64_t tensor = 0; tensor < 2; ++tensor) {
    const float* const of_tensor = source + tensor * elements_of(problem, block);
    if (item.to != BufferId::own_gradient) {
      task.batch = problem.batch;
      task.rows = rows;
      task.src = of_tensor;
      task.dst = reinterpret_cast<float*>(address_of(addresses, item.to) + item.to_offset_bytes) + tensor * elements_of(problem, block);
      task.dst_batch_stride = rows * block_pitch;
      task.dst_row_stride = block_pitch;
      task.dst_head_stride = head_dim;
      tasks.push_back(task);
      continue;
    }
    const ShardPiece& piece = piece_at(plan.shard, item.to_rows[0]);
    const std::int64_t pitch = problem.kv_heads * head_dim;
    float* const target = reinterpret_cast<float*>(addresses.own_gradient + gradient_bytes(problem, resident_offset(problem, piece))) +
                          tensor * problem.batch * piece.global.count * pitch;
    // Several runs of rows interleave with the batch in the block, so each batch entry is a task.
    task.batch = 1;
    task.dst_head_stride = block.kv_heads.stride * head_dim;
    std::int64_t packed = 0;
    for (std::int64_t entry = 0; entry < problem.batch; ++entry) {
      for (std::int64_t run = 0; run < item.to_rows.runs(); ++run) {
        const Progression& local = item.to_rows.run(run);
        task.rows = local.count;
        task.src = of_tensor + packed * block_pitch;
        task.dst = target + (entry * piece.global.count + local.first - piece.local_first) * pitch + block.kv_heads.first * head_dim;
        task.dst_row_stride = local.stride * pitch;
        tasks.push_back(task);
        packed += local.count;
      }
    }
  }
}

kernels::FinishTask finish_task(const RingPlan& plan, const TensorAddresses& addresses,
                                std::span<const kernels::PartialPointers> partials) {
  kernels::FinishTask finish;
  const Problem& problem = plan.problem;
  finish.dtype = problem.dtype;
  finish.combine = combine_of(plan.pattern.mixing);
  finish.batch = problem.batch;
  finish.rows = plan.local_rows;
  finish.heads = problem.heads;
  finish.head_dim = problem.head_dim;
  finish.output_scale = output_scale(plan.pattern);
  finish.partials = checked_narrow<int>(plan.partials);
  finish.extra = checked_narrow<int>(plan.extra_partial);
  std::copy(partials.begin(), partials.end(), finish.partial);
  finish.out = addresses.out;
  finish.lse = addresses.lse;
  return finish;
}

}  // namespace

kernels::Combine combine_of(Mixing mixing) {
  switch (mixing) {
    case Mixing::mean:
      return kernels::Combine::mean;
    case Mixing::sum:
      return kernels::Combine::sum;
    case Mixing::lse:
      break;
  }
  return kernels::Combine::lse;
}

std::byte* address_of(const TensorAddresses& addresses, BufferId buffer) {
  switch (buffer) {
    case BufferId::slot_0:
      return addresses.slots[0];
    case BufferId::slot_1:
      return addresses.slots[1];
    case BufferId::slot_2:
      return addresses.slots[2];
    case BufferId::slot_3:
      return addresses.slots[3];
    case BufferId::send_0:
      return addresses.sends[0];
    case BufferId::send_1:
      return addresses.sends[1];
    case BufferId::extra:
      return addresses.extra;
    case BufferId::own_gradient:
      return addresses.own_gradient;
    case BufferId::resident:
      break;
  }
  return addresses.resident;
}

std::vector<LoweredTransfers> lower_transfers(const RingPlan& plan, const TensorAddresses& addresses) {
  std::vector<LoweredTransfers> lowered;
  for (const Step& step : plan.steps) {
    LoweredTransfers& to = lowered.emplace_back();
    for (const PackItem& item : step.packs) { add_pack_tasks(to.pack, plan, addresses, item); }
    for (const Message& message : step.sends) {
      to.outgoing.push_back({message.peer, address_of(addresses, message.buffer) + message.offset_bytes, message.bytes});
    }
    for (const Message& message : step.receives) {
      to.incoming.push_back({message.peer, address_of(addresses, message.buffer) + message.offset_bytes, message.bytes});
    }
  }
  return lowered;
}

LoweredWork lower_work(const RingPlan& plan, const TensorAddresses& addresses, std::span<const kernels::PartialPointers> partials,
                       std::int64_t accumulator_bytes) {
  ANNULUS_EXPECTS(std::ssize(partials) == plan.partials, "{} partials have an address, and the plan has {}", partials.size(),
                  plan.partials);
  LoweredWork lowered;
  for (std::int64_t number = 0; number < plan.forward_steps; ++number) {
    std::vector<kernels::AttendTask>& tasks = lowered.attend.emplace_back();
    for (const WorkItem& item : plan.steps[number].work) {
      const kernels::AttendTask task =
          attend_task(plan, addresses, partials[static_cast<std::size_t>(item.partial)], accumulator_bytes, item);
      for (const ItemPart& part : parts_of(plan.problem, item)) { tasks.push_back(task_of_part(task, accumulator_bytes, part)); }
      if (item.zero_keys > 0) { lowered.zero_keys.push_back(zero_keys_task(task, item.zero_keys)); }
    }
  }
  lowered.finish = finish_task(plan, addresses, partials);
  return lowered;
}

LoweredGradients lower_gradients(const RingPlan& plan, const TensorAddresses& addresses, std::span<const kernels::PartialPointers> partials,
                                 std::int64_t accumulator_bytes) {
  ANNULUS_EXPECTS(std::ssize(partials) == plan.partials && plan.routing.gradients, "a plan without gradients, or {} partials of {}",
                  partials.size(), plan.partials);
  const Problem& problem = plan.problem;
  LoweredGradients lowered;
  lowered.begin.forward = finish_task(plan, addresses, partials);
  lowered.begin.dout = addresses.dout;
  const std::int64_t own = buffer_bytes(plan, BufferId::own_gradient) / static_cast<std::int64_t>(sizeof(float));
  auto* const own_gradient = reinterpret_cast<float*>(addresses.own_gradient);
  const std::int64_t queries = problem.batch * plan.local_rows * problem.heads * problem.head_dim;
  if (own > 0) {
    lowered.clear_own.push_back({own_gradient, own});
    lowered.round.push_back({problem.dtype, queries, accumulator_bytes, partials.front().acc, addresses.dq});
    lowered.round.push_back({problem.dtype, own, static_cast<std::int64_t>(sizeof(float)), own_gradient, addresses.dkv});
  }
  for (const Step& step : plan.steps) {
    std::vector<kernels::ClearTask>& clear = lowered.clear.emplace_back();
    std::vector<kernels::GradientTask>& tasks = lowered.differentiate.emplace_back();
    std::vector<kernels::AddTask>& add = lowered.add.emplace_back();
    for (const BlockPlace& place : step.contributions) {
      auto* const data = reinterpret_cast<float*>(address_of(addresses, place.buffer) + place.offset_bytes);
      clear.push_back({data, 2 * elements_of(problem, plan.blocks[place.block])});
    }
    for (const SumItem& item : step.sums) { add_sum_tasks(add, plan, addresses, item); }
    if (std::ssize(lowered.clear) <= plan.forward_steps) { continue; }
    for (const WorkItem& item : step.work) {
      const kernels::GradientTask task = gradient_task(plan, addresses, partials, accumulator_bytes, item);
      for (const ItemPart& part : parts_of(problem, item)) { tasks.push_back(gradient_task_of_part(task, accumulator_bytes, part)); }
    }
  }
  return lowered;
}

}  // namespace annulus
