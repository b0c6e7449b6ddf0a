// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace annulus::kernels {

/// Word w of counter or result n is words[w][n]: one array per word, so that kLanes counters advance as vectors.
template <std::size_t kLanes>
using PhiloxWords = std::array<std::array<std::uint32_t, kLanes>, 4>;

/// Philox4x32-10: replaces each of kLanes 128-bit counters by 128 random bits that depend on it and on `key` alone.
/// Source: Salmon, Moraes, Dror, Shaw 2011, Parallel random numbers: as easy as 1, 2, 3, section 3.3.
template <std::size_t kLanes>
constexpr void philox4x32_10(PhiloxWords<kLanes>& words, std::array<std::uint32_t, 2> key) {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53U;
  constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57U;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9U;  // golden ratio
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85U;  // sqrt(3) - 1
  auto& [w0, w1, w2, w3] = words;
  for (int round = 0; round < 10; ++round) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const std::uint64_t product0 = kMultiplier0 * w0[lane];
      const std::uint64_t product1 = kMultiplier1 * w2[lane];
      w0[lane] = static_cast<std::uint32_t>(product1 >> 32U) ^ w1[lane] ^ key[0];
      w1[lane] = static_cast<std::uint32_t>(product1);
      w2[lane] = static_cast<std::uint32_t>(product0 >> 32U) ^ w3[lane] ^ key[1];
      w3[lane] = static_cast<std::uint32_t>(product0);
    }
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
}

}  // namespace annulus::kernels
