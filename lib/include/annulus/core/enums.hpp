// SPDX-License-Identifier: Apache-2.0
// Every choice a user can make by name, with its names. The name printed is the name parsed.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace annulus {

/// Offset o of branch g, segment s, head h (of the KV head with grouped KV heads), for dilation rate r.
enum class OffsetRule {
  group,               ///< g mod r
  group_plus_segment,  ///< (g + s) mod r
  segment,             ///< s mod r
  head,                ///< h mod r
  head_block,          ///< floor(h / ceil(H / r)) of H heads: neighbouring heads share an offset
};

/// Which heads run a branch.
enum class HeadSplit {
  first,  ///< contiguous groups, spare heads to the first groups
  last,   ///< contiguous groups, spare heads to the last groups
  all,    ///< every head runs every branch
};

/// How the branches of one head combine.
enum class Mixing {
  lse,   ///< one softmax over the branches' keys together, a key counted once per branch
  mean,  ///< mean of the outputs of the branches that cover the row
  sum,   ///< their sum
};

/// What happens where the dilation rate does not divide the segment or the segment does not divide the sequence.
enum class Ragged {
  short_stride,  ///< plain stride, short last segment
  wrap,          ///< rows (o + t r) mod L of a segment of L rows, t < ceil(L / r): every offset takes equally many, one may turn over
  truncate,      ///< plain stride, but no segment of L rows has more than floor(L / r) of them
  dense_tail,    ///< plain stride, and the rows past the last whole segment attend each other undilated
  zero_keys,     ///< plain stride, and every segment has the ceil(w / r) keys of a whole one: what it lacks are keys and values of zeros
  reject,        ///< neither happens: a pattern in which it would is refused
};

/// The order in which the operator takes the sequence, before segments are cut. All but `linear` are other operators: other tokens share a
/// segment. The result comes back in the order of the input.
enum class SequenceOrder {
  linear,           ///< as it is
  hilbert,          ///< along a Hilbert curve through the rows of tokens in a square: position i holds the i-th token of the curve
  hilbert_inverse,  ///< the inverse: position i holds the token that token i's place on the curve names
  bit_reversal,     ///< position i holds the i-th of the tokens 0, 1, 2, .. with their bits reversed
};

/// Which tokens a rank owns.
enum class PartitionKind {
  automatic,   ///< zigzag where it balances a causal problem, else contiguous
  contiguous,  ///< neighbouring tokens; the first seq_len mod ranks ranks own one more
  zigzag,      ///< of 2 * ranks such pieces, rank i owns i and 2 * ranks - 1 - i: the same work for all under a causal mask
  striped,     ///< token i on rank i mod ranks: the same work for all in every segment that is longer than that
};

/// How KV blocks travel.
enum class Schedule {
  automatic,  ///< direct where a causal mask and zigzag meet, else ring
  ring,       ///< along the cyclic order of the ranks that need the block, one hop per step
  ring_full,  ///< the classic unpruned ring: whole shards make ranks-1 hops whatever the pattern
  direct,     ///< from its owner to every rank that needs the block, when it needs it
  allgather,  ///< the same, all of them before the first is attended: memory for every block that a rank needs
};

/// In which order a query row meets its keys. It is part of the arithmetic.
enum class KeyOrder {
  automatic,  ///< cyclic where the kernel keeps an order of keys, else arrival
  cyclic,     ///< by position: from the row's own block down to its segment's first key, then from the last down to the own block
  arrival,    ///< resident keys first, then blocks as they come
};

/// In which order the tiles of queries x keys of a segment are visited. It changes results by rounding alone.
enum class TileOrder {
  linear,   ///< as the kernel walks
  hilbert,  ///< along a Hilbert curve over at most 8 x 8 of them
};

enum class TransportKind { automatic, self, loopback, mpi, nccl, p2p };
enum class BackendKind { reference, cpu, cuda };

/// The attention kernel of backend cuda.
enum class KernelKind {
  automatic,  ///< fused where it can serve, else cublas
  cublas,     ///< batched products around a softmax
  fused,      ///< one pass on Hopper's tensor cores
};

/// Whether backend cuda takes tensors from a stream-ordered pool, or each from the driver, to tell a fault of one from a fault of the
/// other.
enum class MemoryPooling { on, off };

template <class Enum>
struct EnumNames;

template <>
struct EnumNames<DType> {
  static constexpr std::array<std::pair<DType, std::string_view>, 3> values{
      {{DType::fp32, "fp32"}, {DType::fp16, "fp16"}, {DType::bf16, "bf16"}}};
};
template <>
struct EnumNames<OffsetRule> {
  static constexpr std::array<std::pair<OffsetRule, std::string_view>, 5> values{{{OffsetRule::group, "group"},
                                                                                  {OffsetRule::group_plus_segment, "group-plus-segment"},
                                                                                  {OffsetRule::segment, "segment"},
                                                                                  {OffsetRule::head, "head"},
                                                                                  {OffsetRule::head_block, "head-block"}}};
};
template <>
struct EnumNames<HeadSplit> {
  static constexpr std::array<std::pair<HeadSplit, std::string_view>, 3> values{
      {{HeadSplit::first, "first"}, {HeadSplit::last, "last"}, {HeadSplit::all, "all"}}};
};
template <>
struct EnumNames<Mixing> {
  static constexpr std::array<std::pair<Mixing, std::string_view>, 3> values{
      {{Mixing::lse, "lse"}, {Mixing::mean, "mean"}, {Mixing::sum, "sum"}}};
};
template <>
struct EnumNames<Ragged> {
  static constexpr std::array<std::pair<Ragged, std::string_view>, 6> values{{{Ragged::short_stride, "short"},
                                                                              {Ragged::wrap, "wrap"},
                                                                              {Ragged::truncate, "truncate"},
                                                                              {Ragged::dense_tail, "dense-tail"},
                                                                              {Ragged::zero_keys, "zero-keys"},
                                                                              {Ragged::reject, "reject"}}};
};
template <>
struct EnumNames<SequenceOrder> {
  static constexpr std::array<std::pair<SequenceOrder, std::string_view>, 4> values{{{SequenceOrder::linear, "linear"},
                                                                                     {SequenceOrder::hilbert, "hilbert"},
                                                                                     {SequenceOrder::hilbert_inverse, "hilbert-inverse"},
                                                                                     {SequenceOrder::bit_reversal, "bit-reversal"}}};
};
template <>
struct EnumNames<PartitionKind> {
  static constexpr std::array<std::pair<PartitionKind, std::string_view>, 4> values{{{PartitionKind::automatic, "auto"},
                                                                                     {PartitionKind::contiguous, "contiguous"},
                                                                                     {PartitionKind::zigzag, "zigzag"},
                                                                                     {PartitionKind::striped, "striped"}}};
};
template <>
struct EnumNames<Schedule> {
  static constexpr std::array<std::pair<Schedule, std::string_view>, 5> values{{{Schedule::automatic, "auto"},
                                                                                {Schedule::ring, "ring"},
                                                                                {Schedule::ring_full, "ring-full"},
                                                                                {Schedule::direct, "direct"},
                                                                                {Schedule::allgather, "allgather"}}};
};
template <>
struct EnumNames<TileOrder> {
  static constexpr std::array<std::pair<TileOrder, std::string_view>, 2> values{
      {{TileOrder::linear, "linear"}, {TileOrder::hilbert, "hilbert"}}};
};
template <>
struct EnumNames<KeyOrder> {
  static constexpr std::array<std::pair<KeyOrder, std::string_view>, 3> values{
      {{KeyOrder::automatic, "auto"}, {KeyOrder::cyclic, "cyclic"}, {KeyOrder::arrival, "arrival"}}};
};
template <>
struct EnumNames<TransportKind> {
  static constexpr std::array<std::pair<TransportKind, std::string_view>, 6> values{{{TransportKind::automatic, "auto"},
                                                                                     {TransportKind::self, "self"},
                                                                                     {TransportKind::loopback, "loopback"},
                                                                                     {TransportKind::mpi, "mpi"},
                                                                                     {TransportKind::nccl, "nccl"},
                                                                                     {TransportKind::p2p, "p2p"}}};
};
template <>
struct EnumNames<BackendKind> {
  static constexpr std::array<std::pair<BackendKind, std::string_view>, 3> values{
      {{BackendKind::reference, "reference"}, {BackendKind::cpu, "cpu"}, {BackendKind::cuda, "cuda"}}};
};
template <>
struct EnumNames<KernelKind> {
  static constexpr std::array<std::pair<KernelKind, std::string_view>, 3> values{
      {{KernelKind::automatic, "auto"}, {KernelKind::cublas, "cublas"}, {KernelKind::fused, "fused"}}};
};
template <>
struct EnumNames<MemoryPooling> {
  static constexpr std::array<std::pair<MemoryPooling, std::string_view>, 2> values{
      {{MemoryPooling::on, "on"}, {MemoryPooling::off, "off"}}};
};

/// The name of `value`; every enumerator has one.
template <class Enum>
constexpr std::string_view to_string(Enum value) {
  for (const auto& [candidate, name] : EnumNames<Enum>::values) {
    if (candidate == value) { return name; }
  }
  return "?";
}

/// The value named `name`, or nothing.
template <class Enum>
constexpr std::optional<Enum> from_string(std::string_view name) {
  for (const auto& [value, candidate] : EnumNames<Enum>::values) {
    if (candidate == name) { return value; }
  }
  return std::nullopt;
}

/// All names, comma separated: for help texts and refusals.
template <class Enum>
std::string names_of() {
  std::string list;
  for (const auto& entry : EnumNames<Enum>::values) {
    if (!list.empty()) { list += ", "; }
    list += entry.second;
  }
  return list;
}

}  // namespace annulus
