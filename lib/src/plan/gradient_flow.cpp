// SPDX-License-Identifier: Apache-2.0
#include "gradient_flow.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace annulus::planning {

namespace {

/// Ranks whose contributions a sum holds, as often as it holds them.
using Contributors = std::vector<std::int64_t>;
using Place = std::pair<BufferId, std::int64_t>;

void add(const Contributors& from, Contributors& to) { to.insert(to.end(), from.begin(), from.end()); }

class Flow {
 public:
  explicit Flow(std::span<const RingPlan> plans) : plans_(plans), memory_(plans.size()) {}

  void run() {
    // Turns of all ranks, and in a turn rank after rank, as ranks that share a process run.
    std::vector<std::tuple<std::int64_t, std::int64_t, std::size_t>> order;
    for (const RingPlan& plan : plans_) {
      for (std::size_t index = 0; index < plan.ops.size(); ++index) { order.emplace_back(plan.ops[index].turn, plan.rank, index); }
    }
    std::sort(order.begin(), order.end());
    for (const auto& [turn, rank, index] : order) {
      const RingPlan& plan = plans_[static_cast<std::size_t>(rank)];
      execute(plan, plan.ops[index]);
    }
    check_home();
  }

 private:
  using Memory = std::map<Place, Contributors>;

  Memory& memory(const RingPlan& plan) { return memory_[plan.rank]; }

  /// Calls visit(block, offset) for the dK and dV that a message carries.
  template <class Visit>
  static void for_each_gradient(const RingPlan& plan, const Message& message, const Visit& visit) {
    std::int64_t offset = message.offset_bytes;
    for (const std::int64_t block : message.blocks) { offset += plan.blocks[block].bytes; }
    for (const std::int64_t block : message.gradients) {
      visit(block, offset);
      offset += gradient_bytes(plan.problem, plan.blocks[block].bytes);
    }
  }

  void execute(const RingPlan& plan, const Op& op) {
    const Step& step = step_or_empty(plan, op.step);
    switch (op.kind) {
      case OpKind::post:
        for (const Message& message : step.sends) {
          std::vector<Contributors>& sent = in_flight_[{op.step, plan.rank, message.peer}];
          for_each_gradient(plan, message,
                            [&](std::int64_t, std::int64_t offset) { sent.push_back(memory(plan)[{message.buffer, offset}]); });
        }
        break;
      case OpKind::wait:
        for (const Message& message : step.receives) {
          const std::vector<Contributors>& sent = in_flight_[{op.step, message.peer, plan.rank}];
          std::size_t number = 0;
          for_each_gradient(plan, message,
                            [&](std::int64_t, std::int64_t offset) { memory(plan)[{message.buffer, offset}] = sent.at(number++); });
        }
        break;
      case OpKind::differentiate:
        contribute(plan, step);
        break;
      case OpKind::accumulate:
        for (const SumItem& sum : step.sums) {
          const Contributors came = memory(plan)[{sum.from, sum.from_offset_bytes}];
          const bool at_home = sum.to == BufferId::own_gradient;
          add(came, at_home ? home_[{plan.rank, sum.block}] : memory(plan)[{sum.to, sum.to_offset_bytes}]);
        }
        break;
      case OpKind::pack:
      case OpKind::attend:
      case OpKind::finish:
      case OpKind::finish_gradients:
        break;
    }
  }

  void contribute(const RingPlan& plan, const Step& step) {
    std::set<std::int64_t> met;
    for (const WorkItem& item : step.work) {
      if (item.keys.block >= 0) { met.insert(item.keys.block); }
    }
    for (const BlockPlace& place : step.contributions) {
      memory(plan)[{place.buffer, place.offset_bytes}] = met.erase(place.block) > 0 ? Contributors{plan.rank} : Contributors();
    }
    ANNULUS_ASSERT(met.empty(), "rank {} has no place for dK and dV of block {}", plan.rank, *met.begin());
    for (const WorkItem& item : step.work) {
      if (item.keys.block >= 0) { expected_.insert({plan.rank, item.keys.block}); }
    }
  }

  void check_home() const {
    for (const auto& [owner_and_block, contributors] : home_) {
      const auto& [owner, own_number] = owner_and_block;
      const BlockKey key = key_of(plans_[static_cast<std::size_t>(owner)].blocks[own_number]);
      Contributors expected;
      for (const auto& [rank, block] : expected_) {
        if (key_of(plans_[static_cast<std::size_t>(rank)].blocks[block]) == key) { expected.push_back(rank); }
      }
      Contributors found = contributors;
      std::sort(found.begin(), found.end());
      ANNULUS_ASSERT(found == expected, "rank {}: dK and dV of its block {} come home with {} contributions instead of {}", owner,
                     own_number, found.size(), expected.size());
    }
    for (const auto& [rank, block] : expected_) {
      const BlockKey key = key_of(plans_[static_cast<std::size_t>(rank)].blocks[block]);
      const bool home = std::any_of(home_.begin(), home_.end(), [&](const auto& entry) {
        return entry.first.first == key.owner && key_of(plans_[static_cast<std::size_t>(key.owner)].blocks[entry.first.second]) == key;
      });
      ANNULUS_ASSERT(home, "what rank {} gives to block {} of rank {} does not come home", rank, block, key.owner);
    }
  }

  std::span<const RingPlan> plans_;
  List<Memory> memory_;                                                                                  ///< by rank
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, std::vector<Contributors>> in_flight_;  ///< by step, sender and receiver
  std::map<std::pair<std::int64_t, std::int64_t>, Contributors> home_;  ///< by owner and its number of the block
  std::set<std::pair<std::int64_t, std::int64_t>> expected_;            ///< rank, and its number of a block that it met
};

}  // namespace

BlockKey key_of(const KvBlock& block) {
  return {block.branch, block.head_class, block.segment, block.owner, block.rows_global, block.kv_heads, block.bytes};
}

std::int64_t global_row(const Shard& shard, std::int64_t local) {
  for (const ShardPiece& piece : shard.pieces) {
    const std::int64_t at = local - piece.local_first;
    if (at >= 0 && at < piece.global.count) { return piece.global[at]; }
  }
  return -1;
}

const Step& step_or_empty(const RingPlan& plan, std::int64_t number) {
  static const Step empty;
  return number < std::ssize(plan.steps) ? plan.steps[number] : empty;
}

void prove_gradient_flow(std::span<const RingPlan> plans) { Flow(plans).run(); }

}  // namespace annulus::planning
