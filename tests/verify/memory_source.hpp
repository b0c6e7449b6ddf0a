// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/io/source.hpp>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

namespace annulus::test {

/// A source whose values are a function of their place: value(tensor, batch, token, head, dim). Counts the tokens it has read.
class MemorySource : public TensorSource {
 public:
  using Value = std::function<float(Tensor, std::int64_t, std::int64_t, std::int64_t, std::int64_t)>;

  MemorySource(const Problem& problem, Value value) : problem_(problem), value_(std::move(value)) {}

  const Problem& problem() const override { return problem_; }
  std::string describe() const override { return "values of a test"; }
  std::string identity() const override { return describe(); }
  bool has_dout() const override { return true; }
  std::uint64_t fingerprint(Tensor /*tensor*/, std::int64_t /*part*/, std::int64_t /*parts*/) const override { return 0; }
  std::int64_t tokens_read(Tensor tensor) const { return tokens_read_[static_cast<std::size_t>(tensor)]; }

  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    tokens_read_[static_cast<std::size_t>(tensor)] += count;
    const std::int64_t heads = heads_of(problem_, tensor);
    kernels::with_element(dtype, [&](auto tag) {
      using Element = decltype(tag);
      auto* element = static_cast<Element*>(out);
      for (std::int64_t token = first; token < first + count; ++token) {
        for (std::int64_t head = 0; head < heads; ++head) {
          for (std::int64_t dim = 0; dim < problem_.head_dim; ++dim) {
            *element++ = kernels::from_float<Element>(value_(tensor, batch, token, head, dim));
          }
        }
      }
    });
  }

 private:
  Problem problem_;
  Value value_;
  mutable std::array<std::atomic<std::int64_t>, kTensors> tokens_read_{};
};

/// Values of [-1, 1) that depend on the seed and the place alone.
inline MemorySource::Value scattered_values(std::uint64_t seed) {
  return [seed](Tensor tensor, std::int64_t batch, std::int64_t token, std::int64_t head, std::int64_t dim) {
    std::uint64_t bits = seed;
    for (const std::int64_t part : {static_cast<std::int64_t>(tensor), batch, token, head, dim}) {
      bits = (bits ^ static_cast<std::uint64_t>(part)) * 0xd1342543de82ef95ULL + 0x9e3779b97f4a7c15ULL;
      bits ^= bits >> 29U;
    }
    return static_cast<float>(static_cast<std::int64_t>(bits >> 40U) - (1 << 23)) * 0x1p-23F;
  };
}

/// Queries of 0, so that all visible keys weigh the same, and values that are the token's number; those of extra keys are 100, 101, ...
inline MemorySource::Value token_number_values() {
  return [](Tensor tensor, std::int64_t, std::int64_t token, std::int64_t, std::int64_t) {
    if (tensor == Tensor::v_extra) { return 100.0F + static_cast<float>(token); }
    return tensor == Tensor::v ? static_cast<float>(token) : 0.0F;
  };
}

}  // namespace annulus::test
