// SPDX-License-Identifier: Apache-2.0
#include "old_names.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <utility>

namespace annulus::app {

namespace {

using Entry = std::pair<std::string_view, std::string_view>;

constexpr std::array<Entry, 6> kClasses{{
    {"RingDilatedAttentionProduction", "production"},
    {"RingDilatedAttentionHybrid", "hybrid"},
    {"RingDilatedAttentionHilbertOptimized", "hilbert-permuted"},
    {"RingMultiheadDilatedAttentionHybrid", "multihead"},
    {"RingDilatedAttentionTrue", "hybrid"},
    {"true", "hybrid"},
}};

constexpr std::string_view kSlices =
    "attended slices of the sequence, each once, to strided keys of all of it; preset hybrid attends inside the segments";
constexpr std::string_view kResidues =
    "attended keys of the whole sequence by their residue; preset hybrid-group-plus-segment has its offsets, inside the segments";
constexpr std::string_view kReversed = "meant to permute by reversed bits; preset hybrid with --order bit-reversal does";
constexpr std::string_view kHybrid = "meant to compute what preset hybrid does";

/// By module, without .py; of a class the words of its name.
constexpr std::array<Entry, 32> kReplaced{{
    {"ring_dilated_attention_production", "is preset production"},
    {"ring_dilated_attention_hybrid", "is preset hybrid"},
    {"ring_dilated_attention_fixed", kSlices},
    {"ring_dilated_attention_refactored", kSlices},
    {"ring_dilated_attention_v3",
     "attended all queries to a multiset of keys, and in a ring to all of them; preset production has its groups, preset dense its ring"},
    {"ring_multihead_dilated_attention_v3",
     "attended all queries to a multiset of keys; preset production has its groups, and a [layer] around it its projections"},
    {"ring_dilated_attention_true", "attended heads to heads, and stopped in a ring; preset dense is the ring with an online softmax"},
    {"true_ring_dilated_attention", "attended heads to heads, and stopped in a ring; preset dense is the ring with an online softmax"},
    {"ring_dilated_attention_v2_collective", "gathered all keys on every rank; preset hybrid with --schedule allgather does"},
    {"ring_dilated_attention_hybrid_fixed", "is preset hybrid-group-plus-segment"},
    {"ring_dilated_attention_hybrid_optimized", kHybrid},
    {"ring_dilated_attention_hybrid_optimized_v2", "took keys that depended on the number of ranks; preset hybrid does not"},
    {"ring_dilated_attention_hybrid_optimized_v2_refactored", kHybrid},
    {"ring_dilated_attention_hybrid_hilbert", "scrambled its keys; preset hilbert with --scale-by-branches is what it meant to reorder"},
    {"ring_dilated_attention_hilbert_fixed",
     "permuted by reversed bits, or at random, and attended slices; preset hybrid with --order bit-reversal attends inside the segments"},
    {"ring_dilated_attention_hilbert_optimized", "is preset hilbert-permuted"},
    {"ring_dilated_attention_hilbert_optimized_fixed", "could not run; preset hilbert-permuted is what it meant to compute"},
    {"ring_dilated_attention_hilbert_optimized_proper", kReversed},
    {"ring_dilated_attention_hilbert_refactored", kReversed},
    {"ring_dilated_attention_hilbert_v2",
     "reordered nothing on one device, where it computed what preset hybrid does; preset hilbert reorders"},
    {"ring_dilated_attention_simple_triton",
     "averaged its branches; --offset segment --head-split all --mixing mean does, on any number of ranks"},
    {"ring_dilated_attention_triton_integrated",
     "averaged its branches with a factor for each key; --offset segment --head-split all --mixing mean is its softmax"},
    {"ring_dilated_attention_triton_kernel", kResidues},
    {"ring_dilated_attention_triton_optimized", kResidues},
    {"ring_distributed_dilated_attention", "could not be constructed; preset distributed is its attention, on any number of ranks"},
    {"ring_multihead_dilated_attention_hybrid", "is preset multihead"},
    {"ring_attention_utils", "is the ring itself: every preset passes blocks, --virtual-ranks simulates it"},
    {"ring_attention_lse", "is how every preset merges partial results"},
    {"ring_attention_lse_optimized", "is how every preset merges partial results"},
    {"ring_attention_bucketed", "is how the kernels work: --tile-rows is the bucket"},
    {"stable_ring_accumulator", "is how every preset merges partial results"},
    {"split_by_rank", "is --partition contiguous"},
}};

/// "RingAttentionV3" as "ring_attention_v3"; other names as they are.
std::string words_of(std::string_view name) {
  if (name.ends_with(".py")) { name.remove_suffix(3); }
  std::string words;
  for (const char letter : name) {
    const bool upper = std::isupper(static_cast<unsigned char>(letter)) != 0;
    if (upper && !words.empty()) { words += '_'; }
    words += static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  }
  return words;
}

template <std::size_t kCount>
std::string_view find(const std::array<Entry, kCount>& entries, std::string_view name) {
  const auto* const found = std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) { return entry.first == name; });
  return found == entries.end() ? std::string_view() : found->second;
}

}  // namespace

std::optional<std::string_view> preset_of_class(std::string_view name) {
  const std::string_view preset = find(kClasses, name);
  return preset.empty() ? std::nullopt : std::optional(preset);
}

std::string_view replacement_of(std::string_view name) { return find(kReplaced, words_of(name)); }

}  // namespace annulus::app
