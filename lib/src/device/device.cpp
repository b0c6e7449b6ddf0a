// SPDX-License-Identifier: Apache-2.0
#include <annulus/device/device.hpp>

namespace annulus {

void Buffer::reset() noexcept {
  if (owner_ != nullptr) { owner_->deallocate(data_, bytes_, use_); }
  owner_ = nullptr;
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace annulus
