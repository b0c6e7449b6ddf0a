// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace annulus {

/// Next number of the SplitMix64 sequence that `state` stands in, which it advances.
/// Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators, figure 18.
constexpr std::uint64_t splitmix64(std::uint64_t& state) {
  state += 0x9e3779b97f4a7c15U;
  std::uint64_t bits = state;
  bits = (bits ^ (bits >> 30U)) * 0xbf58476d1ce4e5b9U;
  bits = (bits ^ (bits >> 27U)) * 0x94d049bb133111ebU;
  return bits ^ (bits >> 31U);
}

}  // namespace annulus
