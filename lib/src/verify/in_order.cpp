// SPDX-License-Identifier: Apache-2.0
#include "in_order.hpp"

#include <algorithm>
#include <cstddef>
#include <numeric>

namespace annulus {

void InOrder::read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const {
  if (tensor == Tensor::k_extra || tensor == Tensor::v_extra) {
    viewed().read(tensor, batch, first, count, dtype, out);
    return;
  }
  const Problem& held = problem();
  const std::int64_t row_bytes = heads_of(held, tensor) * held.head_dim * size_of(dtype);
  const auto stored = [&](std::int64_t place) { return rows_[first + place]; };
  List<std::int64_t> places(count);
  std::iota(places.begin(), places.end(), std::int64_t{0});
  std::sort(places.begin(), places.end(), [&](std::int64_t a, std::int64_t b) { return stored(a) < stored(b); });
  List<std::byte> some;
  for (auto begin = places.begin(), end = begin; begin != places.end(); begin = end) {
    while (end != places.end() && stored(*end) - stored(*begin) == end - begin) { ++end; }
    some.resize((end - begin) * row_bytes);
    viewed().read(tensor, batch, stored(*begin), end - begin, dtype, some.data());
    for (auto place = begin; place != end; ++place) {
      std::copy_n(some.data() + (place - begin) * row_bytes, row_bytes, static_cast<std::byte*>(out) + *place * row_bytes);
    }
  }
}

}  // namespace annulus
