// SPDX-License-Identifier: Apache-2.0
#include <annulus/verify/random_problem.hpp>

#include <annulus/core/error.hpp>

#include "splitmix64.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <string_view>
#include <vector>

namespace annulus {
namespace {

/// The distributions of the standard library differ between implementations; these do not.
class Random {
 public:
  Random(std::uint64_t seed, std::int64_t number) : state_(seed) {
    // The number is added to a scrambled seed: neighbouring seeds must not give the same cases one number apart.
    state_ = next() + static_cast<std::uint64_t>(number) * 0xd1342543de82ef95ULL;
    next();
  }

  /// A stream of its own for a choice that came later, so that all others stay as they were.
  Random(std::uint64_t seed, std::int64_t number, std::string_view choice) : Random(seed ^ hash(choice), number) {}

  std::uint64_t next() { return splitmix64(state_); }

  /// In [low, high]; the modulo's bias is below 2^-50 for the small ranges used here.
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(high - low + 1));
  }

  bool chance(std::int64_t percent) { return between(1, 100) <= percent; }

  template <class List>
  const auto& one_of(const List& list) {
    return list[static_cast<std::size_t>(between(0, static_cast<std::int64_t>(list.size()) - 1))];
  }

  template <class Enum>
  Enum any_of() {
    return one_of(EnumNames<Enum>::values).first;
  }

 private:
  /// FNV-1a.
  static std::uint64_t hash(std::string_view text) {
    std::uint64_t value = 0xcbf29ce484222325ULL;
    for (const char letter : text) { value = (value ^ static_cast<unsigned char>(letter)) * 0x100000001b3ULL; }
    return value;
  }

  std::uint64_t state_;
};

std::int64_t random_seq_len(Random& random, std::int64_t ranks) {
  switch (random.between(0, 9)) {
    case 0:
      return random.between(1, std::min<std::int64_t>(ranks + 1, 64));  // some ranks may own nothing
    case 1:
      return ranks * random.between(1, std::max<std::int64_t>(1, 128 / ranks));  // equal shards
    case 2:
      return random.between(201, 700);
    default:
      return random.between(1, 200);
  }
}

std::int64_t random_segment_length(Random& random, std::int64_t seq_len, std::int64_t shard) {
  switch (random.between(0, 5)) {
    case 0:
      return random.between(1, shard);
    case 1:
      return shard;
    case 2:
      return shard * random.between(1, 4);
    case 3:
      return seq_len;
    case 4:
      return std::int64_t{1} << random.between(0, 8);
    default:
      return random.between(1, seq_len + 10);
  }
}

std::int64_t random_dilation_rate(Random& random, std::int64_t segment_length) {
  switch (random.between(0, 6)) {
    case 0:
    case 1:
      return 1;
    case 2:
      return std::int64_t{1} << random.between(1, 3);
    case 3:
      return segment_length + random.between(0, 2);  // one row of a segment, or none
    case 4:
      return random.between(3, 13);
    default:
      return random.between(1, 4);
  }
}

std::int64_t random_head_dim(Random& random, std::int64_t seq_len) {
  const std::int64_t largest = seq_len > 200 ? 64 : kMaxHeadDim;
  switch (random.between(0, 9)) {
    case 0:
      return random.between(65, 256) % largest + 1;
    case 1:
      return std::min(largest, std::int64_t{1} << random.between(3, 8));  // sizes that kernels specialise for
    case 2:
      return random.between(17, 64);
    default:
      return random.between(1, 16);
  }
}

/// The fused kernel takes 16-bit operands and multiples of 8.
void fit_to_fused(Problem& problem) {
  problem.head_dim = (problem.head_dim + 7) / 8 * 8;
  switch (problem.dtype) {
    case DType::fp32:
      problem.dtype = DType::bf16;
      break;
    case DType::fp16:
    case DType::bf16:
      break;
  }
}

/// Hides the last keys of some batch entries, in some cases.
void add_kv_lengths(RandomCase& drawn, Random random) {
  const bool refused = drawn.pattern.ragged == Ragged::zero_keys || drawn.pattern.order != SequenceOrder::linear;
  if (!random.chance(25) || refused) { return; }
  Problem& problem = drawn.problem;
  for (std::int64_t entry = 0; entry < problem.batch; ++entry) {
    problem.kv_lengths.push_back(random.chance(30) ? problem.seq_len : random.between(1, problem.seq_len));
  }
}

/// Gives every query a few more keys, in some cases.
void add_extra_keys(RandomCase& drawn, Random random) {
  if (!random.chance(25)) { return; }
  drawn.problem.extra_keys = random.chance(70) ? random.between(1, 3) : random.between(4, 300);
}

/// Drops some probabilities, in some cases of kernels that can.
void add_dropout(RandomCase& drawn, Random random) {
  if (!random.chance(20)) { return; }
  drawn.problem.dropout.probability = 0.05 * static_cast<double>(random.between(1, 19));
  drawn.problem.dropout.seed = static_cast<std::int64_t>(random.next() >> 32U);
}

std::int64_t any_divisor(Random& random, std::int64_t number, std::int64_t most) {
  std::vector<std::int64_t> divisors;
  for (std::int64_t divisor = 1; divisor <= std::min(number, most); ++divisor) {
    if (number % divisor == 0) { divisors.push_back(divisor); }
  }
  return random.one_of(divisors);
}

/// Spreads the ranks over batch and heads too, in some cases.
void add_grid(RandomCase& drawn, Random random) {
  if (!random.chance(35)) { return; }
  drawn.grid.batch = any_divisor(random, drawn.ranks, drawn.problem.batch);
  drawn.grid.heads = any_divisor(random, drawn.ranks / drawn.grid.batch, drawn.problem.heads);
}

struct BranchLists {
  std::string segment_lengths;
  std::string dilation_rates;
};

BranchLists branch_lists(const Pattern& pattern) {
  std::vector<std::int64_t> lengths;
  std::vector<std::int64_t> rates;
  for (const Branch& branch : pattern.branches) {
    lengths.push_back(branch.segment_length);
    rates.push_back(branch.dilation_rate);
  }
  return {fmt::format("{}", fmt::join(lengths, ",")), fmt::format("{}", fmt::join(rates, ","))};
}

}  // namespace

std::string RandomCase::describe() const {
  const BranchLists lists = branch_lists(pattern);
  return fmt::format(
      "ranks {}{}, batch {}, seq_len {}, heads {}/{}, head_dim {}, {}{}{}{}, w {}, r {}, offset {}, head-split {}, mixing {}{}, ragged "
      "{}{}, "
      "{}, "
      "{}{}",
      ranks, grid == Grid() ? "" : fmt::format(" as {}", to_string(grid)), problem.batch, problem.seq_len, problem.heads, problem.kv_heads,
      problem.head_dim, to_string(problem.dtype), problem.causal ? ", causal" : "",
      problem.kv_lengths.empty() ? "" : fmt::format(", kv-lengths {}", fmt::join(problem.kv_lengths, ",")),
      (problem.extra_keys == 0 ? "" : fmt::format(", extra-keys {}", problem.extra_keys)) +
          (problem.dropout.probability > 0 ? fmt::format(", dropout {}", problem.dropout.probability) : ""),
      lists.segment_lengths, lists.dilation_rates, to_string(pattern.offset), to_string(pattern.head_split), to_string(pattern.mixing),
      pattern.scale_by_branches ? ", scaled by branches" : "", to_string(pattern.ragged),
      pattern.order == SequenceOrder::linear ? "" : fmt::format(", order {}", to_string(pattern.order)), to_string(partition),
      to_string(schedule), tile_order == TileOrder::linear ? "" : fmt::format(", tile-order {}", to_string(tile_order)));
}

std::string RandomCase::flags() const {
  const BranchLists lists = branch_lists(pattern);
  std::string text = fmt::format(
      "--batch {} --seq-len {} --heads {} --kv-heads {} --head-dim {} --dtype {} --scale {} --seed {} --segment-lengths {} "
      "--dilation-rates {} --offset {} --head-split {} --mixing {} --ragged {} --partition {} --schedule {} --virtual-ranks {}",
      problem.batch, problem.seq_len, problem.heads, problem.kv_heads, problem.head_dim, to_string(problem.dtype), problem.scale, data_seed,
      lists.segment_lengths, lists.dilation_rates, to_string(pattern.offset), to_string(pattern.head_split), to_string(pattern.mixing),
      to_string(pattern.ragged), to_string(partition), to_string(schedule), ranks);
  if (problem.causal) { text += " --causal"; }
  if (!problem.kv_lengths.empty()) { text += fmt::format(" --kv-lengths {}", fmt::join(problem.kv_lengths, ",")); }
  if (problem.extra_keys > 0) { text += fmt::format(" --extra-keys {}", problem.extra_keys); }
  if (problem.dropout.probability > 0) {
    text += fmt::format(" --dropout {} --dropout-seed {}", problem.dropout.probability, problem.dropout.seed);
  }
  if (pattern.scale_by_branches) { text += " --scale-by-branches"; }
  if (pattern.order != SequenceOrder::linear) { text += fmt::format(" --order {}", to_string(pattern.order)); }
  if (grid != Grid()) { text += fmt::format(" --grid {}", to_string(grid)); }
  if (tile_order != TileOrder::linear) { text += fmt::format(" --tile-order {}", to_string(tile_order)); }
  return text;
}

RandomCase random_case(std::uint64_t seed, std::int64_t number, std::optional<std::int64_t> fixed_ranks, KernelKind kernel) {
  ANNULUS_EXPECTS(number >= 0, "case {} does not exist; numbers start at 0", number);
  ANNULUS_EXPECTS(!fixed_ranks || *fixed_ranks >= 1, "a case cannot run on {} ranks", *fixed_ranks);
  Random random(seed, number);
  RandomCase result;
  const std::int64_t drawn_ranks = random.between(1, 16);
  result.ranks = fixed_ranks.value_or(drawn_ranks);

  Problem& problem = result.problem;
  problem.batch = random.chance(60) ? 1 : random.between(2, 3);
  problem.seq_len = random_seq_len(random, result.ranks);
  problem.kv_heads = random.between(1, 4);
  problem.heads = problem.kv_heads * (random.chance(50) ? 1 : random.between(2, 3));
  problem.head_dim = random_head_dim(random, problem.seq_len);
  problem.dtype = random.any_of<DType>();
  if (kernel == KernelKind::fused) { fit_to_fused(problem); }
  problem.causal = random.chance(50);
  const double usual_scale = 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
  problem.scale = random.chance(80) ? usual_scale : 0.0625 * static_cast<double>(random.between(-2, 3));
  if (kernel == KernelKind::fused && problem.scale <= 0) { problem.scale = usual_scale; }

  Pattern& pattern = result.pattern;
  const std::int64_t shard = (problem.seq_len + result.ranks - 1) / result.ranks;
  const std::int64_t branches = random.between(1, 4);
  for (std::int64_t g = 0; g < branches; ++g) {
    const std::int64_t length = random_segment_length(random, problem.seq_len, shard);
    pattern.branches.push_back({length, random_dilation_rate(random, length)});
  }
  pattern.offset = random.any_of<OffsetRule>();
  pattern.head_split = random.any_of<HeadSplit>();
  pattern.mixing = random.any_of<Mixing>();
  constexpr std::array<Ragged, 4> kRagged{Ragged::short_stride, Ragged::truncate, Ragged::dense_tail, Ragged::zero_keys};
  pattern.ragged = random.one_of(kRagged);
  pattern.scale_by_branches = random.chance(25);

  constexpr std::array<Schedule, 4> kSchedules{Schedule::ring, Schedule::ring_full, Schedule::direct, Schedule::allgather};
  result.schedule = random.one_of(kSchedules);
  result.data_seed = random.next() >> 32U;
  if (Random(seed, number, "wrap").chance(20)) { pattern.ragged = Ragged::wrap; }
  result.partition = random.chance(50) ? PartitionKind::zigzag : PartitionKind::contiguous;
  if (Random(seed, number, "partition").chance(30)) { result.partition = PartitionKind::striped; }

  Random order(seed, number, "order");
  if (order.chance(30)) { pattern.order = order.any_of<SequenceOrder>(); }
  if (problem.causal) { pattern.order = SequenceOrder::linear; }  // is refused otherwise
  add_kv_lengths(result, Random(seed, number, "kv-lengths"));
  add_extra_keys(result, Random(seed, number, "extra-keys"));
  add_dropout(result, Random(seed, number, "dropout"));
  add_grid(result, Random(seed, number, "grid"));
  if (Random(seed, number, "tile-order").chance(20)) { result.tile_order = TileOrder::hilbert; }
  return result;
}

}  // namespace annulus
