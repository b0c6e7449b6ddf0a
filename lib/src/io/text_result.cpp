// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/text_result.hpp>

#include <annulus/core/error.hpp>

#include "unfinished_path.hpp"

#include <algorithm>
#include <cerrno>
#include <unistd.h>
#include <utility>

namespace annulus {

struct TextResult::Impl {
  UnfinishedPath place;
  bool written = false;
};

TextResult::TextResult(const std::string& path, bool force, std::int64_t least_bytes) : impl_(new Impl{.place = {path, force}}) {
  impl_->place.lose_name();
  before_work([&] { impl_->place.reserve(least_bytes); });
}

TextResult::~TextResult() = default;

void TextResult::write(std::string_view text) {
  UnfinishedPath& place = impl_->place;
  if (std::exchange(impl_->written, true)) {
    place.renew();
    place.lose_name();
  }
  while (!text.empty()) {
    const ssize_t written = ::write(place.descriptor(), text.data(), text.size());
    if (written < 0 && errno != EINTR) {
      throw RuntimeFailure(fmt::format("{} cannot be written: {}", place.describe(), system_message(errno)));
    }
    text.remove_prefix(static_cast<std::size_t>(std::max<ssize_t>(0, written)));
  }
  place.publish();
}

}  // namespace annulus
