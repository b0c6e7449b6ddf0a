// SPDX-License-Identifier: Apache-2.0
#include "chains.hpp"

#include <annulus/kernels/visible_keys.hpp>

#include "extents.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace annulus::kernels::cuda {
namespace {

constexpr std::int64_t kLargestTaskHeadDim = 256;

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

}  // namespace

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

KeyTile take_tile(Chain& chain) {
  const AttendTask& task = *chain.task;
  KeyTile tile;
  tile.k_begin = chain.k_next;
  chain.k_next = std::min(tile.k_begin + chain.k_step, chain.k_end);
  tile.cols = chain.k_next - tile.k_begin;
  tile.q_begin = first_row_that_sees(task, chain.q_begin, chain.q_end, tile.k_begin);
  tile.rows = chain.q_end - tile.q_begin;
  tile.masked = tile.rows > 0 && visible_keys(task, tile.q_begin) < chain.k_next;
  return tile;
}

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

}  // namespace annulus::kernels::cuda
