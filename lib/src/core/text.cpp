// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/text.hpp>

#include <fmt/format.h>

#include <cstddef>

namespace annulus {

namespace {

/// Bytes of the UTF-8 character that `bytes` begin with; 0 if they begin with none.
std::size_t character_length(std::string_view bytes) {
  const auto byte = [&](std::size_t index) { return index < bytes.size() ? static_cast<unsigned char>(bytes[index]) : 0U; };
  const auto continues = [&](std::size_t index) { return (byte(index) & 0xc0U) == 0x80U; };
  const unsigned first = byte(0);
  if (first < 0x80U) { return bytes.empty() ? 0 : 1; }
  if (first >= 0xc2U && first <= 0xdfU) { return continues(1) ? 2 : 0; }
  if (first >= 0xe0U && first <= 0xefU) {
    const unsigned least = first == 0xe0U ? 0xa0U : 0x80U;  // shorter forms exist below
    const unsigned most = first == 0xedU ? 0x9fU : 0xbfU;   // surrogates above
    return byte(1) >= least && byte(1) <= most && continues(2) ? 3 : 0;
  }
  if (first >= 0xf0U && first <= 0xf4U) {
    const unsigned least = first == 0xf0U ? 0x90U : 0x80U;
    const unsigned most = first == 0xf4U ? 0x8fU : 0xbfU;  // beyond U+10FFFF above
    return byte(1) >= least && byte(1) <= most && continues(2) && continues(3) ? 4 : 0;
  }
  return 0;
}

}  // namespace

bool is_utf8(std::string_view bytes) {
  while (!bytes.empty()) {
    const std::size_t length = character_length(bytes);
    if (length == 0) { return false; }
    bytes.remove_prefix(length);
  }
  return true;
}

std::string printable(std::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    const std::size_t length = character_length(bytes);
    const auto first = static_cast<unsigned char>(bytes.front());
    if (length == 0 || first < 0x20U || first == 0x7fU) {
      text += fmt::format("\\x{:02x}", first);
      bytes.remove_prefix(1);
    } else {
      text += bytes.substr(0, length);
      bytes.remove_prefix(length);
    }
  }
  return text;
}

}  // namespace annulus
