// SPDX-License-Identifier: Apache-2.0
#include "routes.hpp"

namespace annulus::planning {

namespace {

/// Whether a rank has queries that need the keys from another.
bool is_given(const Setting& setting, std::int64_t rank) { return rank != kExtraOwner && setting.partition.rows(rank) > 0; }

}  // namespace

void for_each_taker(const Setting& setting, const std::function<void(std::int64_t)>& visit) {
  if (setting.problem.extra_keys == 0) { return; }
  for (std::int64_t rank = 0; setting.rank == kExtraOwner && rank < setting.partition.ranks(); ++rank) {
    if (is_given(setting, rank)) { visit(rank); }
  }
}

bool takes_extra_keys(const Setting& setting) { return setting.problem.extra_keys > 0 && is_given(setting, setting.rank); }

KvBlock extra_block(const Problem& problem) {
  return {-1, -1, -1, kExtraOwner, Rows<Global>(range(problem.seq_len, problem.seq_len + problem.extra_keys)), range(0, problem.kv_heads),
          0};
}

void add_extra_keys(Routes& routes, const Setting& setting) {
  const bool owns = setting.problem.extra_keys > 0 && setting.rank == kExtraOwner;
  const bool takes = takes_extra_keys(setting);
  if (!owns && !takes) { return; }
  const std::int64_t block = add_block(routes, setting.problem, extra_block(setting.problem));
  if (takes) { routes.receives.push_back({block, 1, kExtraOwner}); }
  for_each_taker(setting, [&](std::int64_t rank) { routes.sends.push_back({block, 1, rank}); });
  routes.uses.push_back({takes ? 1 : 0, block});
}

}  // namespace annulus::planning
