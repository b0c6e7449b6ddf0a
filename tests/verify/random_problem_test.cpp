// SPDX-License-Identifier: Apache-2.0
#include <annulus/verify/random_problem.hpp>

#include <annulus/core/error.hpp>
#include <annulus_test.hpp>

#include <cstdint>
#include <map>
#include <optional>
#include <string>

namespace {

using namespace annulus;

TEST_CASE("a case is the same whenever it is asked for and differs from its neighbours") {
  for (std::int64_t number = 0; number < 200; ++number) {
    const RandomCase once = random_case(7, number, std::nullopt);
    const RandomCase again = random_case(7, number, std::nullopt);
    CHECK(once.problem == again.problem);
    CHECK(once.pattern == again.pattern);
    CHECK(once.flags() == again.flags());
    CHECK(once.flags() != random_case(7, number + 1, std::nullopt).flags());
    CHECK(once.flags() != random_case(8, number, std::nullopt).flags());
  }
}

TEST_CASE("the case of a number never changes, on any machine") {
  CHECK(random_case(1, 0, std::nullopt).flags() ==
        "--batch 1 --seq-len 138 --heads 3 --kv-heads 1 --head-dim 4 --dtype bf16 --scale 0.5 --seed 529393150 "
        "--segment-lengths 30,64,138 --dilation-rates 4,8,4 --offset group-plus-segment --head-split last --mixing lse --ragged truncate "
        "--partition zigzag --schedule direct --virtual-ranks 15");
  CHECK(random_case(42, 1999, std::nullopt).flags() ==
        "--batch 1 --seq-len 5 --heads 1 --kv-heads 1 --head-dim 8 --dtype fp32 --scale 0 --seed 926898765 "
        "--segment-lengths 32,1,4 --dilation-rates 3,8,1 --offset head --head-split first --mixing sum --ragged zero-keys "
        "--partition zigzag --schedule allgather --virtual-ranks 5 --scale-by-branches --tile-order hilbert");
}

TEST_CASE("every case is valid and small") {
  for (std::int64_t number = 0; number < 2000; ++number) {
    const RandomCase random = random_case(3, number, std::nullopt);
    INFO("case " << number << ": " << random.describe());
    CHECK_NOTHROW(validate(random.problem));
    CHECK_NOTHROW(validate(random.pattern));
    CHECK_NOTHROW(validate(random.problem, random.pattern));
    CHECK(random.ranks >= 1);
    CHECK(random.ranks <= 16);
    CHECK(random.problem.seq_len <= 700);
    CHECK(random.data_seed < (std::uint64_t{1} << 32U));
    const Problem& p = random.problem;
    CHECK(p.batch * p.heads * p.seq_len * p.seq_len * p.head_dim < 2'000'000'000);
  }
}

TEST_CASE("fixed ranks are kept and the problems still fall short of them at times") {
  std::int64_t short_ones = 0;
  for (std::int64_t number = 0; number < 500; ++number) {
    const RandomCase random = random_case(3, number, 5);
    CHECK(random.ranks == 5);
    if (random.problem.seq_len < 5) { ++short_ones; }
  }
  CHECK(short_ones > 0);
}

TEST_CASE("2000 cases hold every kind of shape and every choice many times") {
  std::map<std::string, std::int64_t> seen;
  for (std::int64_t number = 0; number < 2000; ++number) {
    const RandomCase random = random_case(1, number, std::nullopt);
    const Problem& problem = random.problem;
    const Pattern& pattern = random.pattern;
    const auto branches = static_cast<std::int64_t>(pattern.branches.size());
    const std::int64_t shard = (problem.seq_len + random.ranks - 1) / random.ranks;
    const auto note = [&](bool holds, const std::string& kind) { seen[kind] += holds ? 1 : 0; };
    note(problem.seq_len % 2 == 1, "odd length");
    note(problem.seq_len < random.ranks, "fewer tokens than ranks");
    note(problem.seq_len % random.ranks != 0, "uneven shards");
    note(problem.seq_len % random.ranks == 0 && random.ranks > 1, "even shards");
    note(problem.seq_len > 200, "long");
    note(random.ranks == 1, "one rank");
    note(random.ranks > 8, "more than 8 ranks");
    note(problem.kv_heads == 1 && problem.heads > 1, "one KV head of several");
    note(problem.kv_heads == problem.heads && problem.heads > 1, "as many KV heads as heads");
    note(problem.kv_heads != 1 && problem.kv_heads != problem.heads, "grouped KV heads");
    note(problem.heads < branches && pattern.head_split != HeadSplit::all, "a branch without a head");
    note(problem.heads % branches != 0 && problem.heads > branches, "spare heads");
    note(problem.batch == 1, "batch 1");
    note(problem.batch == 2, "batch 2");
    note(problem.batch == 3, "batch 3");
    note(problem.head_dim == 1, "head_dim 1");
    note(problem.head_dim > 128, "head_dim above 128");
    note(problem.head_dim % 8 != 0, "head_dim off 8");
    note(problem.causal, "causal");
    note(random.tile_order == TileOrder::hilbert, "tile-order hilbert");
    note(random.tile_order == TileOrder::hilbert && problem.causal && random.ranks > 1, "tile-order hilbert, causal, on ranks");
    note(random.tile_order == TileOrder::hilbert && pattern.ragged == Ragged::zero_keys, "tile-order hilbert with keys of zeros");
    note(random.grid.batch > 1, "grid over batch");
    note(random.grid.heads > 1, "grid over heads");
    note(random.grid.heads > problem.kv_heads, "grid that gives a KV head to several");
    note(random.grid.rings() > 1 && random.grid.rings() < random.ranks, "several rings of several ranks");
    note(random.grid.rings() > 1 && random.grid.rings() == random.ranks, "rings of one rank");
    note(problem.scale < 0, "negative scale");
    note(problem.scale == 0, "no scale");
    note(!problem.causal, "not causal");
    note(problem.extra_keys > 0 && problem.causal, "extra keys, causal");
    note(problem.extra_keys > 3, "many extra keys");
    note(problem.extra_keys > 0 && !problem.kv_lengths.empty(), "extra keys and lengths of keys");
    for (const auto& [value, name] : EnumNames<Mixing>::values) {
      note(problem.extra_keys > 0 && pattern.mixing == value && branches > 1 && pattern.head_split == HeadSplit::all,
           "extra keys, mixing " + std::string(name));
    }
    note(problem.dropout.probability > 0, "dropout");
    note(problem.dropout.probability > 0.5, "much dropout");
    note(problem.dropout.probability > 0 && random.grid.rings() > 1, "dropout on a grid");
    note(problem.dropout.probability > 0 && problem.extra_keys > 0, "dropout of extra keys");
    note(pattern.scale_by_branches, "scaled by branches");
    note(!pattern.scale_by_branches, "not scaled by branches");
    for (std::int64_t count = 1; count <= 4; ++count) { note(branches == count, "branches " + std::to_string(count)); }
    for (const auto& [value, name] : EnumNames<DType>::values) { note(problem.dtype == value, std::string(name)); }
    for (const auto& [value, name] : EnumNames<OffsetRule>::values) { note(pattern.offset == value, "offset " + std::string(name)); }
    for (const auto& [value, name] : EnumNames<HeadSplit>::values) { note(pattern.head_split == value, "split " + std::string(name)); }
    for (const auto& [value, name] : EnumNames<Mixing>::values) { note(pattern.mixing == value, "mixing " + std::string(name)); }
    for (const auto& [value, name] : EnumNames<PartitionKind>::values) {
      if (value == PartitionKind::automatic) { continue; }
      note(random.partition == value && problem.causal, "causal " + std::string(name));
      note(random.partition == value && !problem.causal, "not causal " + std::string(name));
    }
    for (const Ragged rule : {Ragged::short_stride, Ragged::wrap, Ragged::truncate, Ragged::dense_tail, Ragged::zero_keys}) {
      note(pattern.ragged == rule, "ragged " + std::string(to_string(rule)));
    }
    for (const auto& [value, name] : EnumNames<SequenceOrder>::values) {
      note(pattern.order == value, "order " + std::string(name));
      note(pattern.order == value && random.partition == PartitionKind::zigzag, "order " + std::string(name) + " with zigzag");
    }
    for (const auto& [value, name] : EnumNames<Schedule>::values) {
      if (value != Schedule::automatic) { note(random.schedule == value, "schedule " + std::string(name)); }
    }
    for (const Branch& branch : pattern.branches) {
      const std::int64_t w = branch.segment_length;
      const std::int64_t r = branch.dilation_rate;
      note(random.ranks > 1 && w < shard, "segment below the shard");
      note(random.ranks > 1 && w == shard, "segment is the shard");
      note(random.ranks > 1 && w > shard, "segment above the shard");
      note(random.ranks > 1 && w > shard && w % shard != 0, "segment off the shard");
      note(w > problem.seq_len, "segment above the sequence");
      note(w < problem.seq_len && problem.seq_len % w != 0, "short last segment");
      note(r > 1 && r < w && w % r != 0, "rate does not divide the segment");
      note(r > 1 && w % r == 0, "rate divides the segment");
      note(r > w, "rate above the segment");
      note(r == 1, "rate 1");
    }
  }
  for (const auto& [kind, count] : seen) {
    INFO(kind << ": " << count);
    CHECK(count >= 20);
  }
}

TEST_CASE("a case below 0 or on no ranks is refused") {
  CHECK_THROWS_AS(random_case(1, -1, std::nullopt), InvalidArgument);
  CHECK_THROWS_AS(random_case(1, 0, 0), InvalidArgument);
}

}  // namespace
