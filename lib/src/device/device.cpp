// SPDX-License-Identifier: Apache-2.0
#include <annulus/device/device.hpp>

#include <annulus/core/unwinding.hpp>

#include <cstdio>
#include <cstdlib>

namespace annulus {

void Device::require_nothing_held(std::int64_t bytes) noexcept {
  if (bytes == 0 || unwinding()) { return; }
  static_cast<void>(
      std::fprintf(stderr, "annulus: internal error: %lld bytes of memory outlive their device\n", static_cast<long long>(bytes)));
  std::abort();
}

void Buffer::reset() noexcept {
  if (owner_ != nullptr) { owner_->deallocate(data_, bytes_, use_); }
  owner_ = nullptr;
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace annulus
