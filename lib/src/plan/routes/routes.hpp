// SPDX-License-Identifier: Apache-2.0
// Which blocks a rank gets and gives on, from whom and to whom, in which step, and when its queries meet them.
#pragma once

#include "plan/setting.hpp"

#include <cstdint>
#include <functional>
#include <vector>

namespace annulus::planning {

/// One hop of a block to or from this rank.
struct Hop {
  std::int64_t block = 0;  ///< index into Routes::blocks
  std::int64_t step = 0;
  std::int64_t peer = 0;
};

/// Keys that queries of this rank meet in one step.
struct Use {
  std::int64_t step = 0;
  std::int64_t block = -1;   ///< index into Routes::blocks; -1: the rows of the shard's first piece in a segment, for queries of its second
  std::int64_t branch = -1;  ///< these three of own rows
  std::int64_t head_class = -1;
  std::int64_t segment = -1;
  std::int64_t q_piece = -1;  ///< piece of the shard whose queries meet a block; -1: all of them
};

struct Routes {
  List<KvBlock> blocks;
  std::vector<Hop> receives;  ///< by step, peer and block
  std::vector<Hop> sends;     ///< the same
  std::vector<Use> uses;      ///< by step; those of one step in the order in which rows meet them
  std::vector<Hop> ends;      ///< of own blocks: which ranks give them to nobody, and when they get them; by step, peer and block
};

/// Schedule ring: each block passes along the cyclic order of the ranks of its segment, by one each step; past ranks that do not need it
/// its owner sends it, when it would have come.
Routes ring_routes(const Setting& setting);

/// Schedule ring-full: the undilated rows of every rank make ranks-1 hops.
Routes ring_full_routes(const Setting& setting);

/// Schedules direct and allgather: owners send each block to every rank that needs it. Under direct the blocks of a segment come to a rank
/// one by one, in the order in which its rows walk down; under allgather all come in step 1.
///
/// A step of direct is one piece of queries against one piece of keys, counted alike on all ranks: under a causal mask a rank of two pieces
/// takes two steps for keys that both see, so that what is sent in a step is needed in that step by all.
Routes direct_routes(const Setting& setting);

/// The rank that owns the extra keys. It has a query: every partition gives it the first token.
inline constexpr std::int64_t kExtraOwner = 0;

/// Calls visit(rank) for the ranks, ascending, to which this one sends the extra keys: all that have queries, if it owns them.
void for_each_taker(const Setting& setting, const std::function<void(std::int64_t)>& visit);

/// Whether extra keys come to this rank.
bool takes_extra_keys(const Setting& setting);

/// The block of all extra keys, but for its bytes.
KvBlock extra_block(const Problem& problem);

/// Adds the extra keys to the routes of any schedule: in step 1 from their owner to all.
void add_extra_keys(Routes& routes, const Setting& setting);

/// The routes of a schedule, extra keys included.
Routes routes_of(const Setting& setting, Schedule schedule);

/// A rank that owns rows of a segment's row set.
struct Member {
  std::int64_t rank = 0;
  std::vector<Rows<Global>> owned;  ///< by piece of its shard, none empty
  std::int64_t last_row = -1;       ///< largest owned row: the query that sees most under `causal`
};

/// The ranks that own some of `rows`, which are those of a segment; ascending.
std::vector<Member> members_of(const Setting& setting, std::int64_t branch, std::int64_t segment, const Rows<Global>& rows);

/// Appends a block and returns its number.
std::int64_t add_block(Routes& routes, const Problem& problem, KvBlock block);

}  // namespace annulus::planning
