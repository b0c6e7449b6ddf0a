// SPDX-License-Identifier: Apache-2.0
#include "same_problem.hpp"

#include <annulus/core/error.hpp>
#include <annulus/kernels/cpu.hpp>

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

namespace annulus {

namespace {

template <class Number>
std::string list_of(const std::vector<Branch>& branches, Number Branch::* member) {
  std::string text;
  for (const Branch& branch : branches) { text += fmt::format("{}{}", text.empty() ? "" : ",", branch.*member); }
  return text;
}

void add_facts(const Layer& layer, const LayerSource& source, std::vector<Fact>& facts) {
  const auto text = [](auto value) { return fmt::format("{}", value); };
  facts.insert(facts.end(), {{"layer.embed", text(layer.embed)},
                             {"layer.kdim", text(layer.kdim)},
                             {"layer.vdim", text(layer.vdim)},
                             {"layer.bias", text(layer.bias)},
                             {"layer.qk-norm", text(to_string(layer.qk_norm))},
                             {"layer.output-norm", text(to_string(layer.output_norm))},
                             {"layer.norm-epsilon", text(layer.norm_epsilon)},
                             {"layer.rotary", text(to_string(layer.rotary))},
                             {"layer.rotary-base", text(layer.rotary_base)},
                             {"layer.gate", text(to_string(layer.gate))},
                             {"layer.gate-temperature", text(layer.gate_temperature)},
                             {"layer.bias-kv", text(layer.bias_kv)},
                             {"layer.zero-tokens", text(layer.zero_tokens)}});
  for (const auto& [which, name] : EnumNames<Activation>::values) {
    facts.push_back({std::string(name), source.has(which) ? "of the layer" : "absent"});
  }
  for (const auto& [which, name] : EnumNames<Weight>::values) {
    facts.push_back({std::string(name), fmt::format("[{}]", fmt::join(source.extents(which), ", "))});
  }
}

}  // namespace

std::vector<Fact> facts_of(const ResolvedConfig& resolved) {
  const Config& config = resolved.config;
  const Problem& problem = config.problem;
  const Pattern& pattern = config.pattern;
  const auto text = [](auto value) { return fmt::format("{}", value); };
  std::vector<Fact> facts{
      {"batch", text(problem.batch)},
      {"seq-len", text(problem.seq_len)},
      {"heads", text(problem.heads)},
      {"kv-heads", text(problem.kv_heads)},
      {"head-dim", text(problem.head_dim)},
      {"dtype", text(to_string(problem.dtype))},
      {"causal", text(problem.causal)},
      {"scale", text(problem.scale)},
      {"extra-keys", text(problem.extra_keys)},
      {"dropout", text(problem.dropout.probability)},
      {"dropout-seed", text(problem.dropout.seed)},
      {"gradients", text(config.gradients)},
      {"kv-lengths", problem.kv_lengths.empty() ? "none" : fmt::format("{}", fmt::join(problem.kv_lengths, ","))},
      {"segment-lengths", list_of(pattern.branches, &Branch::segment_length)},
      {"dilation-rates", list_of(pattern.branches, &Branch::dilation_rate)},
      {"offset", text(to_string(pattern.offset))},
      {"head-split", text(to_string(pattern.head_split))},
      {"mixing", text(to_string(pattern.mixing))},
      {"ragged", text(to_string(pattern.ragged))},
      {"order", text(to_string(pattern.order))},
      {"scale-by-branches", text(pattern.scale_by_branches)},
      {"grid", to_string(config.grid)},
      {"partition", text(to_string(config.partition))},
      {"schedule", text(to_string(config.schedule))},
      {"key-order", text(to_string(config.key_order))},
      {"tile-order", text(to_string(config.tile_order))},
      {"transport", text(to_string(config.transport))},
      {"backend", text(to_string(config.backend))},
      {"kernel", text(to_string(config.kernel))},
      {"tile-rows", text(config.tile_rows)},
      {"virtual-ranks", text(config.virtual_ranks)},
      {"share-gpu", text(config.share_gpu)},
      {"memory-pool", text(to_string(config.memory_pool))},
      // Copies of one file may have other names on other nodes: what they hold is compared below.
      {"input", config.input.empty() ? resolved.input().describe() : "an input file"},
      {"input's dtype", text(to_string(resolved.input_dtype()))},
      {"layer", config.layer ? "is" : "is not"},
  };
  if (config.layer) { add_facts(*config.layer, *resolved.layer, facts); }
  if (config.backend == BackendKind::cpu) { facts.push_back({"instruction set and product library", kernels::cpu::describe()}); }
  return facts;
}

namespace {

/// Compares what several files hold by a sample that the ranks of each file share, so that a chunk is read by one of them.
void require_same_values(const ResolvedConfig& resolved, const Communicator& comm) {
  const InputSource& input = resolved.input();
  std::string own;
  together(comm, [&] { own = input.identity(); });
  const std::vector<std::string> identities = comm.all_gather(own);
  if (std::all_of(identities.begin(), identities.end(), [&](const std::string& identity) { return identity == own; })) { return; }

  const auto sharing = std::count(identities.begin(), identities.end(), own);
  const auto part = std::count(identities.begin(), identities.begin() + comm.rank(), own);
  std::vector<Fingerprint> parts_of_sums;
  together(comm, [&] { parts_of_sums = input.fingerprints(part, sharing); });
  std::vector<std::uint64_t> sums;
  for (const Fingerprint& fingerprint : parts_of_sums) { sums.push_back(fingerprint.sum); }
  std::vector<std::uint64_t> whole(sums.size());
  const std::string bytes(reinterpret_cast<const char*>(sums.data()), sums.size() * sizeof(sums[0]));
  const std::vector<std::string> parts = comm.all_gather(bytes);
  for (std::size_t rank = 0; rank < parts.size(); ++rank) {
    if (identities[rank] != own) { continue; }
    std::vector<std::uint64_t> theirs(whole.size());
    ANNULUS_ASSERT(parts[rank].size() == bytes.size(), "readers of one file sampled {} and {} bytes of sums", bytes.size(),
                   parts[rank].size());
    std::memcpy(theirs.data(), parts[rank].data(), bytes.size());
    for (std::size_t i = 0; i < whole.size(); ++i) { whole[i] += theirs[i]; }
  }
  std::vector<Fact> facts;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    facts.push_back({.name = parts_of_sums[i].name, .value = fmt::format("with hash {:016x}", whole[i]), .note = input.describe()});
  }
  require_same(comm, facts);
}

}  // namespace

void require_same_problem(const ResolvedConfig& resolved, const Communicator& comm) {
  if (comm.size() == 1) { return; }
  require_same(comm, facts_of(resolved));
  require_same_values(resolved, comm);
}

}  // namespace annulus
