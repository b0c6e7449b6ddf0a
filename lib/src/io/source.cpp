// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/source.hpp>

#include <annulus/core/error.hpp>

namespace annulus {

void TensorSource::read_box(Tensor /*tensor*/, const Box& /*box*/, void* /*out*/) const {
  ANNULUS_ASSERT(false, "{} has no bands", describe());
}

void TensorSource::convert_stored(Tensor /*tensor*/, std::int64_t /*batch*/, std::int64_t /*first*/, std::int64_t /*count*/,
                                  void* /*stored*/, DType /*dtype*/, void* /*out*/) const {
  ANNULUS_ASSERT(false, "{} has no bands", describe());
}

}  // namespace annulus
