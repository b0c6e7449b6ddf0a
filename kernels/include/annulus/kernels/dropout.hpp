// SPDX-License-Identifier: Apache-2.0
// Which probabilities of an attention are dropped.
#pragma once

#include <annulus/kernels/philox.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace annulus::kernels {

/// Each probability of a (batch entry, query head, query, key) is dropped with `probability`, by a draw that depends on `seed` and these
/// four numbers alone: not on ranks, tiles or branches. The others are multiplied by 1 / (1 - probability). Sums and the LSE are of all.
struct Dropout {
  double probability = 0.0;  ///< in [0, 1); 0: nothing is dropped
  std::int64_t seed = 0;
  std::int64_t first_batch = 0;  ///< number of batch entry 0
  bool operator==(const Dropout&) const = default;
};

/// The draws of one query of one head: 32 bits for each key, the words of counter (key / 4, query), under a key of the stream that the
/// counter (batch, head) has under the seed.
class DropoutRow {
 public:
  /// @param batch, head, query  numbers in the whole problem
  DropoutRow(const Dropout& dropout, std::int64_t batch, std::int64_t head, std::int64_t query)
      : dropped_(static_cast<std::uint64_t>(std::llround(dropout.probability * 0x1p32))),
        kept_(1.0 / (1.0 - dropout.probability)),
        query_(static_cast<std::uint64_t>(query)) {
    if (dropped_ == 0) { return; }  // no draw matters
    PhiloxWords<1> words{{{low(batch)}, {high(batch)}, {low(head)}, {high(head)}}};
    philox4x32_10(words, {low(dropout.seed), high(dropout.seed)});
    key_ = {words[0][0], words[1][0]};
  }

  /// What the probability of a key is multiplied by.
  double factor(std::int64_t key) const {
    if (dropped_ == 0) { return kept_; }
    PhiloxWords<1> words = counters<1>(key / 4);
    philox4x32_10(words, key_);
    return of(words[static_cast<std::size_t>(key % 4)][0]);
  }

  /// The factors of keys first, first + stride, ...
  void factors(std::int64_t first, std::int64_t stride, std::int64_t count, float* out) const {
    if (stride != 1) {
      for (std::int64_t i = 0; i < count; ++i) { out[i] = static_cast<float>(factor(first + i * stride)); }
      return;
    }
    constexpr std::int64_t kFours = 16;
    for (std::int64_t four = first / 4; four * 4 < first + count; four += kFours) {
      PhiloxWords<kFours> words = counters<kFours>(four);
      philox4x32_10(words, key_);
      const std::int64_t begin = std::max(first, 4 * four);
      const std::int64_t end = std::min(first + count, 4 * (four + kFours));
      for (std::int64_t key = begin; key < end; ++key) {
        out[key - first] = static_cast<float>(of(words[static_cast<std::size_t>(key % 4)][static_cast<std::size_t>(key / 4 - four)]));
      }
    }
  }

 private:
  static std::uint32_t low(std::int64_t number) { return static_cast<std::uint32_t>(number); }
  static std::uint32_t high(std::int64_t number) { return static_cast<std::uint32_t>(static_cast<std::uint64_t>(number) >> 32U); }

  template <std::size_t kLanes>
  PhiloxWords<kLanes> counters(std::int64_t four) const {
    PhiloxWords<kLanes> words;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const std::int64_t number = four + static_cast<std::int64_t>(lane);
      words[0][lane] = low(number);
      words[1][lane] = high(number);
      words[2][lane] = static_cast<std::uint32_t>(query_);
      words[3][lane] = static_cast<std::uint32_t>(query_ >> 32U);
    }
    return words;
  }
  double of(std::uint32_t draw) const { return draw < dropped_ ? 0.0 : kept_; }

  std::uint64_t dropped_;  ///< of 2^32 draws
  double kept_;
  std::uint64_t query_;
  std::array<std::uint32_t, 2> key_{};
};

}  // namespace annulus::kernels
